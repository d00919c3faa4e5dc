"""The contestants of the throughput benchmark: folospec with and without drafters, and the ways of
transformers to generate.

All are greedy, generate a fixed number of tokens with no EOS (neither banned nor obeyed), keep no
prefix between runs, and work on token ids alone: nobody's time has text in it.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from folospec import LLM, SamplingParams
from folospec.models.loader import resolve_model

PROMPT_LOOKUP_NGRAM = 2
ASSISTANT_CONFIDENCE = 0.4
"""What transformers takes by default: a draft ends at a token less likely than this. Set here so
that the rows can say it."""
_BATCHED_TOKENS = 2048
COUNTS = (
    "num_steps",
    "num_target_passes",
    "num_drafts",
    "num_draft_tokens",
    "num_accepted_tokens",
    "draft_time",
    "target_time",
    "sampling_time",
)


@dataclass(frozen=True, slots=True)
class Setup:
    """What all contestants have in common."""

    model: str
    draft_model: str
    dtype: str
    num_speculative_tokens: int
    max_batch: int


@dataclass(slots=True)
class Run:
    """One pass over the prompts. `seconds` is what counts; `details` adds up over runs."""

    seconds: float
    token_ids: list[list[int]]
    details: dict[str, float] = field(default_factory=dict)


class Contestant(ABC):
    """One way to generate. `settings` goes into the rows; `only_batch_1` says that it takes no
    larger batch."""

    name: str
    settings: dict[str, Any]
    only_batch_1 = False

    @abstractmethod
    def generate(self, batch: list[list[int]], max_tokens: int) -> Run:
        """Complete the prompts of one batch, `max_tokens` tokens each."""

    def run(self, prompts: list[list[int]], batch: int, max_tokens: int) -> Run:
        """Complete all prompts, `batch` at a time.

        Raises:
            RuntimeError: a prompt got another number of tokens.
        """
        total = Run(0.0, [])
        for first in range(0, len(prompts), batch):
            part = self.generate(prompts[first : first + batch], max_tokens)
            total.seconds += part.seconds
            total.token_ids += part.token_ids
            for key, value in part.details.items():
                total.details[key] = total.details.get(key, 0) + value
        lengths = [len(ids) for ids in total.token_ids]
        if lengths != [max_tokens] * len(prompts):
            raise RuntimeError(f"{len(prompts)} prompts x {max_tokens} tokens became {lengths}")
        return total


class Folospec(Contestant):
    """folospec, plain or with a drafter."""

    def __init__(self, name: str, setup: Setup, speculative: dict[str, Any] | None) -> None:
        self.name = f"folospec {name}"
        self.settings = {"enable_prefix_caching": False, "speculative": speculative}
        self.llm = LLM(
            setup.model,
            speculative=speculative,
            dtype=setup.dtype,
            max_num_seqs=setup.max_batch,
            max_num_batched_tokens=max(_BATCHED_TOKENS, setup.max_batch),
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
        )

    def generate(self, batch: list[list[int]], max_tokens: int) -> Run:
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        before = self.llm.stats()
        begin = time.perf_counter()
        outputs = self.llm.generate(
            [{"prompt_token_ids": ids} for ids in batch], params, use_tqdm=False
        )
        seconds = time.perf_counter() - begin
        after = self.llm.stats()
        return Run(
            seconds,
            [output.outputs[0].token_ids for output in outputs],
            {key: after[key] - before[key] for key in COUNTS},
        )


class TransformersModels:
    """The transformers models that its contestants share."""

    def __init__(self, setup: Setup) -> None:
        self.target = self._load(setup.model, setup)
        self.draft = self._load(setup.draft_model, setup)
        self.draft.generation_config.num_assistant_tokens = setup.num_speculative_tokens
        self.draft.generation_config.num_assistant_tokens_schedule = "constant"
        self.draft.generation_config.assistant_confidence_threshold = ASSISTANT_CONFIDENCE

    def _load(self, name: str, setup: Setup) -> Any:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = getattr(torch, setup.dtype)
        model: Any = AutoModelForCausalLM.from_pretrained(resolve_model(name), dtype=dtype)
        # Unset here, because `generate` fills what its config leaves out from this one.
        model.generation_config.eos_token_id = None
        return model.to(device).eval()


class TransformersGenerate(Contestant):
    """`generate` on a batch padded on the left, or one of its speculative modes at batch 1."""

    def __init__(
        self, name: str, models: TransformersModels, settings: dict[str, Any], **options: Any
    ) -> None:
        self.name = f"transformers {name}"
        self.models, self.settings, self.options = models, settings, options
        self.only_batch_1 = bool(options)

    @torch.inference_mode()
    def generate(self, batch: list[list[int]], max_tokens: int) -> Run:
        config = GenerationConfig(
            max_new_tokens=max_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        begin = time.perf_counter()
        width = max(map(len, batch))
        device = self.models.target.device
        output = self.models.target.generate(
            torch.tensor([[0] * (width - len(ids)) + ids for ids in batch], device=device),
            attention_mask=torch.tensor(
                [[0] * (width - len(ids)) + [1] * len(ids) for ids in batch], device=device
            ),
            generation_config=config,
            **self.options,
        )
        token_ids = output[:, width:].tolist()
        return Run(time.perf_counter() - begin, token_ids)


class TransformersGenerateBatch(Contestant):
    """`generate_batch`, continuous batching, with a manager that lives on between runs.

    Its KV cache has to be told its size: left alone it takes a share of the machine's memory. The
    time is that from the start of the first request to the end of the last, as the requests say
    themselves; starting and stopping the manager's thread is not held against it, and is in
    `call_seconds`.
    """

    name = "transformers generate_batch"

    def __init__(self, models: TransformersModels) -> None:
        self.models, self.batch = models, 0
        self.settings = {
            "max_batch_tokens": _BATCHED_TOKENS,
            "allow_block_sharing": False,
            "attention": models.target.config._attn_implementation,
            "seconds": "of the requests' own lifespans",
        }

    def generate(self, batch: list[list[int]], max_tokens: int) -> Run:
        from transformers import ContinuousBatchingConfig  # of recent versions only

        if self.batch != len(batch):
            self.models.target.destroy_cached_continuous_batching_manager()
            self.batch = len(batch)
        options = ContinuousBatchingConfig(
            max_batch_tokens=_BATCHED_TOKENS, allow_block_sharing=False
        )
        longest = max(map(len, batch)) + max_tokens
        options.num_blocks = len(batch) * (-(-longest // options.page_size) + 1)
        begin = time.perf_counter()
        outputs = self.models.target.generate_batch(
            batch,
            generation_config=GenerationConfig(
                max_new_tokens=max_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
            ),
            continuous_batching_config=options,
            persistent_manager=True,
            record_timestamps=True,
        )
        call_seconds = time.perf_counter() - begin
        results = list(outputs.values())
        errors = [str(result.error) for result in results if result.error]
        if errors or len(results) != len(batch):
            raise RuntimeError(f"{len(results)} of {len(batch)} results; errors: {errors}")
        lifespans = [result.lifespan for result in results]
        seconds = max(end for _, end in lifespans) - min(start for start, _ in lifespans)
        return Run(
            seconds,
            [list(result.generated_tokens) for result in results],
            {"call_seconds": call_seconds},
        )


def make_contestants(setup: Setup) -> Sequence[Contestant]:
    """Load everything; folospec plain and transformers generate come first in their kind."""
    k = setup.num_speculative_tokens
    models = TransformersModels(setup)
    draft = {"method": "draft_model", "model": setup.draft_model, "num_speculative_tokens": k}
    return [
        Folospec("plain", setup, None),
        Folospec("ngram", setup, {"method": "ngram", "num_speculative_tokens": k}),
        Folospec("draft_model", setup, draft),
        TransformersGenerate("generate", models, {}),
        TransformersGenerateBatch(models),
        TransformersGenerate(
            "assistant_model",
            models,
            {
                "assistant_model": setup.draft_model,
                "num_assistant_tokens": k,
                "num_assistant_tokens_schedule": "constant",
                "assistant_confidence_threshold": ASSISTANT_CONFIDENCE,
            },
            assistant_model=models.draft,
        ),
        TransformersGenerate(
            "prompt_lookup",
            models,
            {"prompt_lookup_num_tokens": k, "max_matching_ngram_size": PROMPT_LOOKUP_NGRAM},
            prompt_lookup_num_tokens=k,
            max_matching_ngram_size=PROMPT_LOOKUP_NGRAM,
        ),
    ]
