"""Puts the components of an engine together, around the loaded models."""

from __future__ import annotations

from dataclasses import dataclass

from folospec.config import EngineConfig
from folospec.core.kv_cache_manager import KVCacheManager
from folospec.core.scheduler import Scheduler
from folospec.core.stats import EngineStats
from folospec.engine.commit import Committer
from folospec.engine.engine_state import EngineState
from folospec.requests.input_processor import InputProcessor, Limits
from folospec.requests.logprobs import LogprobsTaker
from folospec.requests.open_requests import OpenRequests
from folospec.requests.output_processor import OutputProcessor
from folospec.spec.proposer import Proposer
from folospec.spec.verifier import Verifier
from folospec.worker.loading import Parts
from folospec.worker.run_ahead import RunAhead
from folospec.worker.step_timing import measured_costs
from folospec.worker.worker import Worker


@dataclass(slots=True)
class Components:
    """What the stages of a step are done by, and who admits and delivers."""

    manager: KVCacheManager
    scheduler: Scheduler
    stats: EngineStats
    proposer: Proposer
    run_ahead: RunAhead
    worker: Worker
    outputs: OutputProcessor
    logprobs: LogprobsTaker
    inputs: InputProcessor
    state: EngineState
    open: OpenRequests
    verifier: Verifier
    committer: Committer


def build(config: EngineConfig, parts: Parts) -> Components:
    """Make the components, each with those that it works with.

    Raises:
        ValueError: an option cannot be had with the others.
    """
    manager = KVCacheManager(
        parts.num_blocks, config.block_size, enable_prefix_caching=config.enable_prefix_caching
    )
    scheduler = Scheduler(
        manager,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        enable_chunked_prefill=config.enable_chunked_prefill,
    )
    stats = EngineStats(prefix_cache=manager.stats)
    limits = _limits(config, parts)
    proposer = Proposer(
        config.speculative,
        parts.handles,
        manager,
        stats,
        vocab_size=limits.vocab_size,
        device=parts.device,
        strict=config.strict_drafters,
        costs=measured_costs(config, parts),
    )
    run_ahead = RunAhead(config, parts.target, proposer.needs)
    shows_law, rule = config.logprobs_mode == "processed_logprobs", proposer.rule
    worker = Worker(
        parts.runners,
        proposer.needs.aux_hidden_state_layers,
        verifies=rule.shares_noise and rule.has_kernels and not shows_law,
        ahead=run_ahead.lengths,
    )
    outputs, state = OutputProcessor(), EngineState(strict_drafters=config.strict_drafters)
    logprobs = LogprobsTaker(outputs, parts.tokenizer)
    inputs = InputProcessor(config, limits, parts.tokenizer, proposer)
    defaults = parts.default_sampling_params
    requests = OpenRequests(
        inputs, scheduler, outputs, defaults, lambda: state.broken_by is not None
    )
    return Components(
        manager,
        scheduler,
        stats,
        proposer,
        run_ahead,
        worker,
        outputs,
        logprobs,
        inputs,
        state,
        requests,
        Verifier(proposer.acceptance, stats, requests.fail, shows_law=shows_law),
        Committer(scheduler, worker, stats, outputs, logprobs, requests.fail),
    )


def _limits(config: EngineConfig, parts: Parts) -> Limits:
    return Limits(
        vocab_size=parts.target.model.config.vocab_size,
        max_model_len=parts.max_model_len,
        num_slots=parts.num_blocks * config.block_size,
        eos_token_ids=parts.eos_token_ids,
    )


def warm_up(config: EngineConfig, parts: Parts, components: Components) -> None:
    """Record the CUDA graphs that plain steps and steps with drafts will want."""
    proposer = components.proposer
    parts.target.warm_up(
        max_num_seqs=config.max_num_seqs,
        max_rows_each=1 + proposer.limit,
        taps=proposer.needs.aux_hidden_state_layers,
    )
    components.run_ahead.warm_up(config.max_num_seqs)
    for drafter in parts.drafters:
        drafter.warm_up(config.max_num_seqs)
    for runner in parts.all_runners:
        runner.close_graphs()
