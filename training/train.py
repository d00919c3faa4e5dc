"""Train `folospec-demo` (the target) and `folospec-demo-draft` together, on the CPU or a GPU.

One pass over each batch trains three things: the target by cross-entropy, its early exit (the
stream after layer `EXIT_LAYER`, through the target's own final norm and head, as in LayerSkip,
arXiv 2404.16710) by cross-entropy on half of the batch, and the draft model by the Kullback-Leibler
divergence from the target's distribution (distillation). Hidden matrices are updated by Muon,
embeddings and norms by AdamW; warm-up, constant, then linear decay to zero.

    python training/train.py --steps 1700          # resumes from build/demo/checkpoint.pt if there
    is one
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import corpus
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

SEED = 20261121
EXIT_LAYER = 3
EXIT_WEIGHT = 0.3
BATCH_TOKENS = 8192
SHORT_WINDOW, LONG_WINDOW, LONG_FROM = (
    256,
    1024,
    0.75,
)  # window lengths, and the progress at which the long one starts
WARMUP_STEPS, DECAY_FROM = 100, 0.6
LEARNING_RATE = 3e-3


def make_model(
    hidden: int, layers: int, intermediate: int, heads: int, kv_heads: int
) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=corpus.VOCAB_SIZE,
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=LONG_WINDOW,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def make_models() -> nn.ModuleDict:
    torch.manual_seed(SEED)
    target = make_model(hidden=256, layers=6, intermediate=704, heads=4, kv_heads=2)
    target.config.early_exit_layer = EXIT_LAYER
    return nn.ModuleDict({"target": target, "draft": make_model(96, 2, 256, heads=3, kv_heads=3)})


def hidden_states(model: LlamaForCausalLM, token_ids: Tensor) -> list[Tensor]:
    """Return the residual stream before layer 0, 1, ..., and after the last: each [batch, length,
    hidden]."""
    body = model.model
    stream = body.embed_tokens(token_ids)
    positions = torch.arange(token_ids.shape[1], device=token_ids.device)[None]
    rotary = body.rotary_emb(stream, positions)
    states = [stream]
    for layer in body.layers:
        stream = layer(
            stream, attention_mask=None, position_ids=positions, position_embeddings=rotary
        )
        states.append(stream)
    return states


def logits_of(model: LlamaForCausalLM, state: Tensor) -> Tensor:
    return model.lm_head(model.model.norm(state)).flatten(0, -2)


def losses(models: nn.ModuleDict, window: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (target cross-entropy, exit cross-entropy, draft divergence), nats per token, of a
    [batch, length + 1] batch."""
    inputs, labels = window[:, :-1], window[:, 1:].flatten()
    target, draft = models["target"], models["draft"]
    with torch.autocast(window.device.type, torch.bfloat16):
        states = hidden_states(target, inputs)
        logits = logits_of(target, states[-1])
        half = len(inputs) // 2
        exit_logits = logits_of(target, states[EXIT_LAYER][:half])
        draft_logits = logits_of(draft, hidden_states(draft, inputs)[-1])
        target_loss = F.cross_entropy(logits, labels)
        exit_loss = F.cross_entropy(exit_logits, labels[: len(exit_logits)])
        target_log_probs = F.log_softmax(logits.detach().float(), -1)
        draft_log_probs = F.log_softmax(draft_logits.float(), -1)
        divergence = (target_log_probs.exp() * (target_log_probs - draft_log_probs)).sum(-1).mean()
    return target_loss, exit_loss, divergence


def make_optimizers(models: nn.ModuleDict) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in models.named_parameters() if p.ndim == 2 and ".layers." in n]
    others = [p for n, p in models.named_parameters() if not (p.ndim == 2 and ".layers." in n)]
    return [
        torch.optim.Muon(
            matrices, lr=LEARNING_RATE, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def learning_rate(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    decay = min(1.0, (1 - step / steps) / (1 - DECAY_FROM))
    return LEARNING_RATE * warm * decay


def batch_of(stream: np.ndarray, step: int, length: int, device: torch.device) -> Tensor:
    """Draw random windows, a function of the step alone, so that a resumed run sees what an
    unbroken one would."""
    rng = np.random.default_rng([SEED, step])
    starts = rng.integers(0, len(stream) - length - 1, BATCH_TOKENS // length)
    rows = np.stack([stream[s : s + length + 1] for s in starts]).astype(np.int64)
    return torch.from_numpy(rows).to(device)


def train(steps: int, work: Path, device: torch.device, compile_losses: bool) -> None:
    _, streams, _ = corpus.prepare(work)
    models = make_models().to(device)
    optimizers = make_optimizers(models)
    checkpoint, log = work / "checkpoint.pt", work / "log.jsonl"
    first, seconds = 0, 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device)
        models.load_state_dict(saved["models"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        first, seconds = saved["step"], saved["seconds"]

    def save(step: int) -> None:
        state = {"models": models.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
        partial = checkpoint.with_suffix(".partial")
        torch.save({**state, "step": step, "seconds": seconds}, partial)
        partial.replace(checkpoint)

    step_losses = torch.compile(losses, dynamic=False) if compile_losses else losses
    for step in tqdm(range(first, steps), initial=first, total=steps, mininterval=10):
        begin = time.perf_counter()
        length = LONG_WINDOW if step >= LONG_FROM * steps else SHORT_WINDOW
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps)
        target_loss, exit_loss, divergence = step_losses(
            models, batch_of(streams["train"], step, length, device)
        )
        (target_loss + EXIT_WEIGHT * exit_loss + divergence).backward()
        torch.nn.utils.clip_grad_norm_(models["target"].parameters(), 1.0)
        torch.nn.utils.clip_grad_norm_(models["draft"].parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        seconds += time.perf_counter() - begin
        if step % 20 == 0:
            row = {"step": step, "seconds": round(seconds), "target": target_loss.item()}
            with log.open("a") as file:
                file.write(
                    json.dumps({**row, "exit": exit_loss.item(), "draft_kl": divergence.item()})
                    + "\n"
                )
        if (step + 1) % 100 == 0 or step + 1 == steps:
            save(step + 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps", type=int, default=1700, help=f"optimizer steps of {BATCH_TOKENS} tokens"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("build/demo"), help="checkpoints, token streams, log"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true", help="run without torch.compile")
    args = parser.parse_args()
    train(args.steps, args.work, torch.device(args.device), not args.no_compile)


if __name__ == "__main__":
    main()
