"""Maps the option names of other engines, or refuses them with what to write instead.

A name is accepted where its meaning is the same.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class OptionNames:
    """The names under which users of other engines look for the options of one object."""

    owner: str
    """The object, for messages."""
    same: Mapping[str, str] = field(default_factory=dict)
    """Other name -> own name, where both mean the same."""
    instead: Mapping[str, str] = field(default_factory=dict)
    """Other name -> what to write instead, or why there is no such option."""
    example: str = ""
    """Options as a call has them, for messages."""

    def own(
        self, given: Mapping[str, Any], known: Collection[str], what: str = ""
    ) -> dict[str, Any]:
        """Return the options under their own names.

        Args:
            given: options by any name.
            known: the own names.
            what: how messages call an option, by default "option of" the owner.

        Raises:
            ValueError: a name is unknown or means something else here, or one option is given
                under two names.
        """
        what = what or f"option of {self.owner}"
        found: dict[str, Any] = {}
        for name, value in given.items():
            own = name if name in known else self.same.get(name, "")
            if own not in known:
                raise ValueError(self._refusal(name, known, what))
            if own in found:
                others = [other for other in given if own in (other, self.same.get(other))]
                raise ValueError(f"{' and '.join(others)} are one {what}, give one of them")
            found[own] = value
        return found

    def _refusal(self, name: str, known: Collection[str], what: str) -> str:
        if name in self.instead:
            return f"there is no {what} {name!r}: {self.instead[name]}"
        near = difflib.get_close_matches(name, [*known, *self.same, *self.instead], n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known) or 'none'}"
        return f"unknown {what} {name!r}; {hint}"


def takes_names(names: OptionNames) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a method take its parameters by the names of `names` too; an unknown name is a
    `ValueError`."""

    def decorate(method: Callable[P, R]) -> Callable[P, R]:
        parameters = list(inspect.signature(method).parameters)
        known = dict.fromkeys(parameters[1:])

        @wraps(method)
        def renamed(*args: P.args, **kwargs: P.kwargs) -> R:
            if kwargs.keys() <= known.keys():
                return method(*args, **kwargs)
            placed = dict(zip(parameters[1:], args[1:], strict=False))
            names.own({**placed, **kwargs}, known)
            return method(*args, **names.own(kwargs, known))

        return renamed

    return decorate


def constructor_takes_names(names: OptionNames) -> Callable[[type[T]], type[T]]:
    """`takes_names` for the constructor of a dataclass whose fields go by name. A value without a
    name, and a field that is left out and has no default, are a `ValueError`, too."""

    def decorate(cls: type[T]) -> type[T]:
        init = cls.__init__
        known = dict(list(inspect.signature(init).parameters.items())[1:])
        required = [name for name, one in known.items() if one.default is one.empty]

        @wraps(init)
        def by_name(self: T, *args: Any, **kwargs: Any) -> None:
            if args:
                call = f"{cls.__name__}({names.example})"
                raise ValueError(f"options go by name, as in {call}; got {args!r:.200}")
            options = kwargs if kwargs.keys() <= known.keys() else names.own(kwargs, known)
            for name in required:
                if name not in options:
                    call = f"{names.owner}({names.example})"
                    raise ValueError(f"{names.owner} needs the option {name!r}, as in {call}")
            init(self, **options)

        setattr(cls, "__init__", by_name)  # noqa: B010
        return cls

    return decorate


def _instead(*rows: tuple[str, str]) -> dict[str, str]:
    """Advice by name, from rows of names and the advice for all of them."""
    return {name: advice for names, advice in rows for name in names.split()}


SAMPLING_NAMES = OptionNames(
    owner="SamplingParams",
    example="temperature=0.8, top_p=0.95",
    same={
        **dict.fromkeys(("max_new_tokens", "max_completion_tokens"), "max_tokens"),
        **dict.fromkeys(("n_predict", "num_predict"), "max_tokens"),
        "min_new_tokens": "min_tokens",
        "num_return_sequences": "n",
        "temp": "temperature",
        "sampling_seed": "seed",
    },
    instead=_instead(
        ("do_sample", "temperature=0 is greedy, with more the tokens are sampled"),
        ("max_length min_length", "give max_tokens or min_tokens, which count the output alone"),
        (
            "stop_strings stop_sequences stop_words",
            "give stop; the text ends before the stop string, or with it if "
            "include_stop_str_in_output=True",
        ),
        (
            "eos_token_id eos_token_ids end_id",
            "give stop_token_ids, which end the output as the model's own end tokens do; "
            "ignore_eos=True leaves those out",
        ),
        ("repeat_penalty", "give repetition_penalty, which looks at all of prompt and output"),
        (
            "top_n_tokens n_probs top_logprobs top_logprobs_num return_logprob output_scores",
            "give logprobs, the number of most likely tokens whose logprobs are returned",
        ),
        ("logits_processor", "give logits_processors, functions of (output_token_ids, logits)"),
        ("bad_words_ids", "give bad_words, a list of texts"),
        ("suppress_tokens", "give logit_bias, with -inf for each token id"),
        (
            "num_assistant_tokens prompt_lookup_num_tokens assistant_model",
            "give speculative= to LLM, and num_speculative_tokens to draft less for one request",
        ),
        (
            "num_beams num_beam_groups use_beam_search beam_width length_penalty early_stopping "
            "diversity_penalty",
            "there is no beam search; best_of returns the most likely of several samples",
        ),
        (
            "typical_p typ_p top_a tfs_z mirostat mirostat_tau mirostat_eta epsilon_cutoff "
            "eta_cutoff xtc_probability xtc_threshold",
            "the filters are top_k, top_p and min_p",
        ),
        (
            "no_repeat_ngram_size encoder_repetition_penalty dry_multiplier repeat_last_n",
            "the penalties are repetition_penalty, presence_penalty and frequency_penalty",
        ),
        (
            "guided_json guided_regex guided_choice guided_grammar guided_decoding ebnf grammar "
            "structured_outputs response_format json_schema regex constraints force_words_ids",
            "there is no constrained decoding; functions in logits_processors can mask logits",
        ),
        ("detokenize", "LLM(skip_tokenizer_init=True) runs on token ids alone"),
        ("stream streamer output_kind", "llm.stream(...) yields the text as it comes"),
    ),
)

ENGINE_NAMES = OptionNames(
    owner="LLM",
    example='model="folospec-demo"',
    same={
        **dict.fromkeys(("model_path", "model_name", "model_id", "model_name_or_path"), "model"),
        "pretrained_model_name_or_path": "model",
        "speculative_config": "speculative",
        "torch_dtype": "dtype",
        "num_gpu_blocks_override": "num_blocks",
        "page_size": "block_size",
        **dict.fromkeys(("n_ctx", "max_seq_len", "context_length"), "max_model_len"),
        **dict.fromkeys(("max_running_requests", "max_batch_size"), "max_num_seqs"),
        "disable_cuda_graph": "enforce_eager",
        "tokenizer_path": "tokenizer",
        "random_seed": "seed",
    },
    instead=_instead(
        (
            "num_speculative_tokens speculative_model draft_model assistant_model "
            "num_assistant_tokens prompt_lookup_num_tokens ngram_prompt_lookup_max "
            "ngram_prompt_lookup_min speculative_algorithm speculative_draft_model_path "
            "speculative_num_steps speculative_num_draft_tokens",
            'give it in speculative=, such as {"method": "draft_model", "model": ..., '
            '"num_speculative_tokens": 5}',
        ),
        ("max_length", "give max_model_len here, or max_tokens in SamplingParams"),
        (
            "max_tokens max_new_tokens temperature top_p top_k min_p stop repetition_penalty "
            "logprobs n ignore_eos",
            "give it in SamplingParams",
        ),
        ("device_map", "give device, one device of torch"),
        (
            "tensor_parallel_size pipeline_parallel_size data_parallel_size tp_size dp_size "
            "distributed_executor_backend",
            "a model runs on one device",
        ),
        ("attn_implementation", "give attention_backend, by a name that `folospec info` lists"),
        ("load_in_8bit load_in_4bit quantization_config", 'give quantization="int8" or "fp8"'),
        (
            "mem_fraction_static kv_cache_memory_bytes",
            "give gpu_memory_utilization, or kv_cache_memory in bytes",
        ),
        ("chunked_prefill_size", "give max_num_batched_tokens and enable_chunked_prefill"),
        ("long_prefill_token_threshold max_long_partial_prefills", "give max_prefill_slowdown"),
        (
            "swap_space cpu_offload_gb",
            "KV stays on its device, and a preempted sequence is computed again",
        ),
        (
            "max_seq_len_to_capture cuda_graph_max_bs",
            "CUDA graphs are recorded for up to max_num_seqs sequences",
        ),
        ("max_logprobs", "logprobs may be as large as the vocabulary"),
        (
            "revision code_revision tokenizer_revision download_dir load_format",
            "give the folder of a checkpoint as the model",
        ),
        ("enable_lora max_loras max_lora_rank lora_modules", "there is no LoRA"),
    ),
)

DRAFTER_NAMES = OptionNames(
    owner="a drafter",
    same={
        **dict.fromkeys(("draft_model", "draft_model_path", "assistant_model"), "model"),
        **dict.fromkeys(("speculative_model", "speculative_draft_model_path"), "model"),
        **dict.fromkeys(("num_assistant_tokens", "max_draft_len"), "num_speculative_tokens"),
        "prompt_lookup_num_tokens": "num_speculative_tokens",
    },
)
"""Of every drafter; a drafter's file has the names for its own options."""

_IN_PARAMS = dict.fromkeys(
    (
        *("n", "best_of", "temperature", "top_k", "top_p", "min_p", "seed", "stop", "logprobs"),
        *("max_tokens", "min_tokens", "repetition_penalty", "presence_penalty", "ignore_eos"),
        *("frequency_penalty", "stop_token_ids", "logit_bias", "bad_words"),
        *SAMPLING_NAMES.same,
        *SAMPLING_NAMES.instead,
    ),
    "give it in sampling_params=SamplingParams(...)",
)
GENERATE_NAMES = OptionNames(
    owner="generate",
    same={"prompt": "prompts", "prompt_token_ids": "prompts", "params": "sampling_params"},
    instead=_IN_PARAMS,
)
CHAT_NAMES = OptionNames(
    owner="chat",
    same={"conversation": "messages", "params": "sampling_params"},
    instead=_IN_PARAMS,
)
STREAM_NAMES = OptionNames(
    owner="stream",
    same={"prompt_token_ids": "prompt", "params": "sampling_params"},
    instead=_IN_PARAMS,
)
