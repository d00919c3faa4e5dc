"""The arithmetic of growing a Llama model to a larger one that computes the same function.

The layers of the small model are made wide by repetition. The residual stream becomes r copies of
itself, side by side; heads and the neurons of the MLP become n copies each:

                  x x x x     r copies of the stream: the mean square is that of one, and so is eps
                    |
                norm / r      every norm's weight is divided by r, the last one's too, so that ...
                    |
         [W W W W]  |         ... what reads the stream can repeat its columns: r W (x / r) = W x
         [W W W W]  |
            h h               n copies of every head (keys and values too) and of every neuron
            | |
         [s1 V  s2 V]         what writes the stream has the columns of each copy times a share,
         [s1 V  s2 V]         shares that sum to 1; and its rows r times: every copy of the stream
         [s1 V  s2 V]         stays a copy
         [s1 V  s2 V]

So in real arithmetic the function is the same, exactly, the tied output matrix included. No weight
is zero and every one of them counts. r is a power of two and the shares are, so no weight loses a
bit: what bfloat16 holds of the small model it holds of the grown one, and the checkpoints in
bfloat16 and in float32 are one and the same model.

Between the small model's layers stand new ones that add nothing. They are random; only, their heads
and neurons come in pairs of equals, whose columns in what writes the stream are opposite:

         h h    g g           duplicates compute the same,
         | |    | |
       [+u -u  +w -w]         and u h - u h = 0

That is exact in real arithmetic too. Summed in floats, rounding leaves a rest; the columns are made
so small (`QUIET`) that the rest is all but lost when it is added to the stream, while all of them
are still normal numbers in bfloat16 and float32, and opposite ones stay opposite when they are
rounded to fewer bits. Nothing is zero here either: an engine has the work of an ordinary layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LOUD = 0.02
"""Standard deviation of the weights of added layers that read the stream."""
QUIET = 2.0**-14
"""That of those which write it. What is to cancel is then small beside the stream, and what
rounding leaves of it far below the stream's own rounding."""

Tensors = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a Llama model."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    inner: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Which part of the small model each part of the grown model is a copy of."""

    copies: int
    """Of the stream."""
    stream: Tensor
    """int64 [hidden]"""
    queries: Tensor
    """int64 [heads]"""
    keys: Tensor
    """int64 [kv_heads]"""
    neurons: Tensor
    """int64 [inner]"""
    layers: tuple[int, ...]
    """Where the small model's layers stand among the grown model's."""
    head_size: int

    @classmethod
    def of(cls, config: dict[str, Any], shape: Shape) -> Plan:
        """Plan the growth of a model to a shape.

        Raises:
            ValueError: the model cannot grow to the shape.
        """
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        copies, rest = divmod(shape.hidden, config["hidden_size"])
        if rest or copies & (copies - 1) or copies < 1:
            raise ValueError(
                f"hidden must be {config['hidden_size']} times a power of two, got {shape.hidden}"
            )
        group, small_group = shape.heads // shape.kv_heads, heads // kv_heads
        if shape.heads % shape.kv_heads or group % small_group or group % 2:
            raise ValueError(
                f"heads must be an even multiple of kv_heads and of {small_group} kv_heads, got "
                f"{shape.heads} and {shape.kv_heads}"
            )
        if shape.kv_heads % kv_heads:
            raise ValueError(f"kv_heads must be a multiple of {kv_heads}, got {shape.kv_heads}")
        if shape.inner < config["intermediate_size"] or shape.inner % 2:
            raise ValueError(
                f"inner must be even and at least {config['intermediate_size']}, got {shape.inner}"
            )
        depth = config["num_hidden_layers"]
        if shape.layers < depth:
            raise ValueError(f"layers must be at least {depth}, got {shape.layers}")
        keys = torch.arange(shape.kv_heads) % kv_heads
        within = torch.arange(group) % small_group
        return cls(
            copies=copies,
            stream=torch.arange(shape.hidden) % config["hidden_size"],
            queries=(small_group * keys[:, None] + within).flatten(),
            keys=keys,
            neurons=torch.arange(shape.inner) % config["intermediate_size"],
            layers=tuple(index * shape.layers // depth for index in range(depth)),
            head_size=config["head_dim"],
        )

    def rows(self, heads: Tensor) -> Tensor:
        """The rows of the small model that the rows of such heads are copies of."""
        return (self.head_size * heads[:, None] + torch.arange(self.head_size)).flatten()


def shares(sources: Tensor) -> Tensor:
    """Share out each source among its copies: powers of two that sum to 1 for every source.

    Args:
        sources: int64 [n], what each is a copy of.

    Returns:
        float32 [n].
    """
    counts, seen = Counter(sources.tolist()), Counter[int]()
    found = []
    for source in sources.tolist():
        found.append(halves(counts[source])[seen[source]])
        seen[source] += 1
    return torch.tensor(found)


def halves(count: int) -> list[float]:
    """`count` powers of two that sum to 1, as equal as they can be: 5 are 1/8 1/8 1/4 1/4 1/4."""
    level = 1
    while 2 * level <= count:
        level *= 2
    halved = count - level
    return [0.5 / level] * (2 * halved) + [1.0 / level] * (level - halved)


def grown_layer(layer: Tensors, plan: Plan) -> Tensors:
    """A layer of the small model, made wide. Keys are names within the layer."""
    queries, keys = plan.rows(plan.queries), plan.rows(plan.keys)
    head_shares = shares(plan.queries).repeat_interleave(plan.head_size)
    read = {
        "self_attn.q_proj": queries,
        "self_attn.k_proj": keys,
        "self_attn.v_proj": keys,
        "mlp.gate_proj": plan.neurons,
        "mlp.up_proj": plan.neurons,
    }
    written = {
        "self_attn.o_proj": (queries, head_shares),
        "mlp.down_proj": (plan.neurons, shares(plan.neurons)),
    }
    wide = {f"{name}.weight": layer[f"{name}.weight"][rows] for name, rows in read.items()}
    wide = {name: weight[:, plan.stream] for name, weight in wide.items()}
    for name, (columns, share) in written.items():
        wide[f"{name}.weight"] = (layer[f"{name}.weight"][:, columns] * share)[plan.stream]
    for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
        wide[name] = layer[name][plan.stream] / plan.copies
    return wide


def added_layer(shape: Shape, plan: Plan, generator: torch.Generator) -> Tensors:
    """A layer that adds nothing: random, its heads and neurons in pairs that cancel."""

    def normal(*size: int, scale: float = LOUD) -> Tensor:
        return torch.randn(size, generator=generator) * scale

    def duplicates(weight: Tensor, block: int) -> Tensor:
        """Every block of rows twice."""
        return (
            weight.view(-1, 1, block, shape.hidden).expand(-1, 2, -1, -1).reshape(-1, shape.hidden)
        )

    def opposites(width: int, block: int) -> Tensor:
        half = normal(shape.hidden, width // (2 * block), 1, block, scale=QUIET)
        return torch.cat([half, -half], 2).flatten(1)

    size = plan.head_size
    queries, keys = shape.heads * size, shape.kv_heads * size
    return {
        "input_layernorm.weight": (1 + normal(shape.hidden)) / plan.copies,
        "self_attn.q_proj.weight": duplicates(normal(queries // 2, shape.hidden), size),
        "self_attn.k_proj.weight": normal(keys, shape.hidden),
        "self_attn.v_proj.weight": normal(keys, shape.hidden),
        "self_attn.o_proj.weight": opposites(queries, size),
        "post_attention_layernorm.weight": (1 + normal(shape.hidden)) / plan.copies,
        "mlp.gate_proj.weight": duplicates(normal(shape.inner // 2, shape.hidden), 1),
        "mlp.up_proj.weight": duplicates(normal(shape.inner // 2, shape.hidden), 1),
        "mlp.down_proj.weight": opposites(shape.inner, 1),
    }


def grown_parts(
    config: dict[str, Any], demo: Tensors, shape: Shape, seed: int = 0
) -> Iterator[Tensors]:
    """Yield the grown model's tensors in float32, layer by layer, embedding and last norm first.

    Raises:
        ValueError: the model cannot grow to the shape.
    """
    plan, generator = Plan.of(config, shape), torch.Generator().manual_seed(seed)
    yield {
        "model.embed_tokens.weight": demo["model.embed_tokens.weight"][:, plan.stream],
        "model.norm.weight": demo["model.norm.weight"][plan.stream] / plan.copies,
    }
    for index in range(shape.layers):
        if index in plan.layers:
            prefix = f"model.layers.{plan.layers.index(index)}."
            own = {k.removeprefix(prefix): v for k, v in demo.items() if k.startswith(prefix)}
            layer = grown_layer(own, plan)
        else:
            layer = added_layer(shape, plan, generator)
        yield {f"model.layers.{index}.{name}": weight for name, weight in layer.items()}
