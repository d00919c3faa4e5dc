"""Drive the engine by hand: requests come while others run, and one is aborted.

Run: python examples/08_engine_loop.py
"""

from folospec import EngineConfig, LLMEngine, SamplingParams, SpeculativeConfig

ARRIVALS = {  # step -> (request id, prompt, most tokens)
    0: ("long", "def main():\n", 48),
    2: ("short", "class Error(Exception):\n", 12),
    4: ("never", "while True:\n", 500),
}
ABORT_AT = 8


def main() -> None:
    engine = LLMEngine(
        EngineConfig(
            model="folospec-demo",
            speculative=SpeculativeConfig.of({"method": "ngram", "num_speculative_tokens": 4}),
        )
    )
    step = 0
    while step <= ABORT_AT or engine.has_unfinished_requests:
        if step in ARRIVALS:
            request_id, prompt, max_tokens = ARRIVALS[step]
            params = SamplingParams(temperature=0, max_tokens=max_tokens)
            engine.add_request(prompt, params, request_id=request_id)
        if step == ABORT_AT and (aborted := engine.abort("never")):
            print(f"step {step}: aborted 'never' with {len(aborted.outputs[0].token_ids)} tokens")
        for output in engine.step():
            completion = output.outputs[0]
            if output.finished:
                print(
                    f"step {step}: {output.request_id!r} finished by {completion.finish_reason}, "
                    f"{len(completion.token_ids)} tokens in {output.metrics.num_target_passes} "
                    "target passes"
                )
        step += 1
    stats = engine.stats()
    print(f"{stats['num_free_blocks']} of {stats['num_blocks']} blocks are free again")


if __name__ == "__main__":
    main()
