"""Puts the stages of an engine together, around the loaded models."""

from __future__ import annotations

from dataclasses import dataclass

from folospec.config import EngineConfig
from folospec.core.kv_cache_manager import KVCacheManager
from folospec.core.scheduler import Scheduler
from folospec.core.stats import EngineStats
from folospec.engine.commit import Committer
from folospec.engine.engine_state import EngineState
from folospec.requests.input_processor import InputProcessor, Limits
from folospec.requests.logprobs import LogprobsProcessor
from folospec.requests.open_requests import OpenRequests
from folospec.requests.output_processor import OutputProcessor
from folospec.spec.proposer import Proposer
from folospec.spec.verifier import Verifier
from folospec.worker.loading import EngineComponents
from folospec.worker.multi_step import MultiStep
from folospec.worker.step_timing import measured_costs
from folospec.worker.worker import Worker


@dataclass(slots=True)
class Stages:
    """What the stages of a step are done by, and who admits and delivers."""

    manager: KVCacheManager
    scheduler: Scheduler
    stats: EngineStats
    proposer: Proposer
    multi_step: MultiStep
    worker: Worker
    outputs: OutputProcessor
    logprobs: LogprobsProcessor
    inputs: InputProcessor
    state: EngineState
    open: OpenRequests
    verifier: Verifier
    committer: Committer


def build(config: EngineConfig, components: EngineComponents) -> Stages:
    """Make the stages, each with those that it works with.

    Raises:
        ValueError: an option cannot be had with the others.
    """
    manager = KVCacheManager(
        components.num_blocks, config.block_size, enable_prefix_caching=config.enable_prefix_caching
    )
    scheduler = Scheduler(
        manager,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        enable_chunked_prefill=config.enable_chunked_prefill,
    )
    stats = EngineStats(prefix_cache=manager.stats)
    limits = _limits(config, components)
    proposer = Proposer(
        config.speculative,
        components.handles,
        manager,
        stats,
        vocab_size=limits.vocab_size,
        device=components.device,
        strict=config.strict_drafters,
        costs=measured_costs(config, components),
    )
    multi_step = MultiStep(config, components.target, proposer.needs)
    shows_processed, rule = config.logprobs_mode == "processed_logprobs", proposer.rule
    worker = Worker(
        components.runners,
        proposer.needs.aux_hidden_state_layers,
        verifies=rule.shares_noise and rule.has_kernels and not shows_processed,
        lengths=multi_step.lengths,
    )
    outputs, state = OutputProcessor(), EngineState(strict_drafters=config.strict_drafters)
    logprobs = LogprobsProcessor(outputs, components.tokenizer)
    inputs = InputProcessor(config, limits, components.tokenizer, proposer)
    defaults = components.default_sampling_params
    requests = OpenRequests(
        inputs, scheduler, outputs, defaults, lambda: state.broken_by is not None
    )
    return Stages(
        manager,
        scheduler,
        stats,
        proposer,
        multi_step,
        worker,
        outputs,
        logprobs,
        inputs,
        state,
        requests,
        Verifier(proposer.acceptance, stats, requests.fail, shows_processed=shows_processed),
        Committer(scheduler, worker, stats, outputs, logprobs, requests.fail),
    )


def _limits(config: EngineConfig, components: EngineComponents) -> Limits:
    return Limits(
        vocab_size=components.target.model.config.vocab_size,
        max_model_len=components.max_model_len,
        num_slots=components.num_blocks * config.block_size,
        eos_token_ids=components.eos_token_ids,
    )


def warm_up(config: EngineConfig, components: EngineComponents, stages: Stages) -> None:
    """Record the CUDA graphs that plain steps and steps with drafts will want."""
    proposer = stages.proposer
    components.target.warm_up(
        max_num_seqs=config.max_num_seqs,
        max_rows_each=1 + proposer.limit,
        aux_layers=proposer.needs.aux_hidden_state_layers,
    )
    stages.multi_step.warm_up(config.max_num_seqs)
    for drafter in components.drafters:
        drafter.warm_up(config.max_num_seqs)
    for runner in components.all_runners:
        runner.freeze_graphs()
