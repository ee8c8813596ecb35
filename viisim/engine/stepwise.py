"""The engine's scheduler driven one step at a time, for `viisim conform`.

An adapter only: it constructs the very `Scheduler` (and, inside it, `BlockPool`) that a
simulation constructs, and reads off in full what the scheduler keeps aggregated.
"""

from __future__ import annotations

from collections import deque

from viisim.conform import Observation
from viisim.engine.scheduler import Batch, Scheduler, SchedulerSettings
from viisim.engine.sequence import DECODING, Sequence
from viisim.golden import GoldenConfig, GoldenRequest


class SteppedScheduler:
    """A `viisim.conform.StepEngine` around one `Scheduler`.

    `lazy` leaves the content of decoding sequences unkeyed until a look-up wants it, as in a
    simulation; `hashes` is then too small until it does.
    """

    def __init__(self, config: GoldenConfig, lazy: bool = False) -> None:
        self.scheduler = Scheduler(
            SchedulerSettings(
                num_kv_blocks=config.num_blocks,
                block_tokens=config.block_size,
                max_num_seqs=config.max_num_active_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                max_model_len=config.max_model_len,
                prefix_caching=config.enable_prefix_caching,
                chunked_prefill=config.enable_chunked_prefill,
                scheduling_policy=config.policy,
                long_prefill_token_threshold=config.long_prefill_token_threshold,
                adaptive_long_prefill=config.long_prefill_token_threshold_adaptive,
                reserve_full_prompt=config.scheduler_reserve_full_isl,
                watermark_blocks=config.watermark_blocks,
                async_scheduling=config.async_scheduling,
            )
        )
        self._lazy = lazy
        self._sequences: dict[str, Sequence] = {}
        self._in_flight: deque[Batch] = deque()

    @property
    def has_requests(self) -> bool:
        """Whether any request is running or waiting."""
        return self.scheduler.has_requests

    @property
    def batches_in_flight(self) -> int:
        """Batches scheduled whose output is not processed yet."""
        return len(self._in_flight)

    @property
    def free_blocks(self) -> int:
        """Blocks that no request uses, cached ones included."""
        return self.scheduler.pool.free_blocks

    def add(self, request: GoldenRequest) -> None:
        """A request arrives."""
        sequence = self._sequences[request.id] = Sequence(
            request.id,
            request.prompt,
            request.prompt_tokens,
            request.output_tokens,
            request.out_seg,
            request.priority,
            request.arrival_time,
        )
        self.scheduler.add(sequence)

    def abort(self, request_id: str) -> None:
        """End a request that is running or waiting."""
        self.scheduler.abort(self._sequences[request_id])

    def schedule(self) -> Observation:
        """Form the next batch."""
        scheduler = self.scheduler
        batch = scheduler.schedule()
        if not batch.is_empty:
            self._in_flight.append(batch)
        if not self._lazy:
            scheduler.key_all_growing()
        scheduler.pool.settle()
        computed = {sequence: self._computed(sequence) for sequence in scheduler.running}
        tokens = dict(batch.prefills)
        resumed = [s for s in batch.admitted if s.preemptions]
        return Observation(
            scheduled=[(s.name, n) for s, n in self._scheduled(batch).items()],
            new=[s.name for s in batch.admitted if not s.preemptions],
            resumed=[s.name for s in resumed],
            preempted=[s.name for s in batch.preempted],
            cached=[(s.name, computed[s] - tokens[s]) for s in batch.admitted],
            running=[s.name for s in scheduler.running],
            computed=list(computed.values()),
            waiting=[s.name for s in scheduler.waiting],
            free_blocks=self.free_blocks,
            hashes=scheduler.pool.contents,
        )

    def update(self) -> list[str]:
        """Process the output of the oldest batch in flight."""
        return [
            sequence.name for sequence in self.scheduler.update(self._in_flight.popleft().lasts)
        ]

    def _computed(self, sequence: Sequence) -> int:
        if sequence.state == DECODING:
            return self.scheduler.tokens_of(sequence) - 1
        return sequence.computed

    def _scheduled(self, batch: Batch) -> dict[Sequence, int]:
        """Tokens by sequence, in the order of the running list."""
        prefills = dict(batch.prefills)
        if batch.literal is not None:
            return batch.literal | prefills
        decoding = {
            sequence: 1
            for sequence in self.scheduler.running
            if sequence not in prefills and (sequence.state == DECODING or sequence in batch.lasts)
        }
        return decoding | prefills
