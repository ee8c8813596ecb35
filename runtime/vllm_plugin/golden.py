"""vLLM's own scheduler, driven by hand: a script for the interpreter that has vLLM.

Run by `runtime.vllm_plugin.stepped`, it says vLLM's version and serves one engine at a time: a
line of JSON `[method, argument]` on stdin calls a method of `GoldenEngine`, a line on stdout
answers `{"result": ..., "state": ...}` or `{"error": ...}`. No model is loaded and no worker
started: the scheduler is given the tokens that a model would have sampled. Imports the standard
library and vllm. Written against vLLM 0.32.0.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import zlib
from collections import deque
from pathlib import Path
from typing import Any, TextIO

_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
_SEGMENT = 1 << 20
"""Token k of segment s has the number s * 2**20 + k (the rule of the shared golden traces)."""

_ARCHITECTURE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1 << 20,
    "vocab_size": 128,
    "torch_dtype": "float32",
}
"""Some full-attention model: the scheduler asks it for nothing but its kind."""


def vllm_config(config: dict[str, Any], folder: Path) -> Any:
    """The engine configuration of a scenario; `folder` is where the model's goes."""
    from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig

    (folder / "config.json").write_text(json.dumps(_ARCHITECTURE))
    scheduler_config = SchedulerConfig(
        max_num_seqs=config["max_num_seqs"],
        max_num_active_seqs=config["max_num_active_seqs"],
        max_num_batched_tokens=config["max_num_batched_tokens"],
        max_model_len=config["max_model_len"],
        is_encoder_decoder=False,
        enable_chunked_prefill=config["enable_chunked_prefill"],
        policy=config["policy"],
        long_prefill_token_threshold=config["long_prefill_token_threshold"],
        long_prefill_token_threshold_adaptive=config["long_prefill_token_threshold_adaptive"],
        scheduler_reserve_full_isl=config["scheduler_reserve_full_isl"],
        watermark=config["watermark"],
        async_scheduling=False,
    )
    vllm = VllmConfig(
        model_config=ModelConfig(
            model=str(folder),
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=config["max_model_len"],
        ),
        cache_config=CacheConfig(
            block_size=config["block_size"],
            enable_prefix_caching=config["enable_prefix_caching"],
        ),
        scheduler_config=scheduler_config,
    )
    # What the platform's checks would refuse or round is what a scenario is about.
    vllm.cache_config.block_size = config["block_size"]
    vllm.cache_config.num_gpu_blocks = config["num_blocks"]
    scheduler_config.enable_chunked_prefill = config["enable_chunked_prefill"]
    scheduler_config.async_scheduling = config["async_scheduling"]
    return vllm


def scheduler_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """What the engine of a scenario would construct its scheduler with."""
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    with tempfile.TemporaryDirectory() as folder:
        vllm = vllm_config(config, Path(folder))
    block = FullAttentionSpec(
        block_size=config["block_size"], num_kv_heads=1, head_size=1, dtype=torch.float32
    )
    return {
        "vllm_config": vllm,
        "kv_cache_config": KVCacheConfig(
            num_blocks=config["num_blocks"],
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["layer"], block)],
        ),
        "structured_output_manager": StructuredOutputManager(vllm),
        "block_size": config["block_size"],
        "log_stats": False,
    }


def new_scheduler(config: dict[str, Any], preempted: list[str]) -> Any:
    """vLLM's scheduler of a scenario. It adds the ids that it preempts to `preempted`."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    base: Any = AsyncScheduler if config["async_scheduling"] else Scheduler

    class Watched(base):  # type: ignore[misc]  # which of the two is known only now
        """Tells whom it preempts, in order; the output of `schedule()` does not."""

        def _preempt_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
            preempted.append(request.request_id)
            super()._preempt_request(request, *args, **kwargs)

    return Watched(**scheduler_arguments(config))


class GoldenEngine:
    """One scheduler, in the terms of `viisim.conform.StepEngine`."""

    def __init__(self, config: dict[str, Any]) -> None:
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash

        self._preempted: list[str] = []
        self._scheduler = new_scheduler(config, self._preempted)
        self._in_flight: deque[tuple[Any, set[str]]] = deque()
        """Batches, each with the ids of those that it samples a token for."""
        self._out_segments: dict[str, int] = {}
        init_none_hash(sha256)
        self._hasher = (
            get_request_block_hasher(config["block_size"], sha256)
            if config["enable_prefix_caching"]
            else None
        )

    def configuration(self, _: object) -> dict[str, Any]:
        """The values that the scheduler ended up with: a trace's config line."""
        import vllm

        scheduler = self._scheduler
        config = scheduler.scheduler_config
        base = type(scheduler).__mro__[1]
        manager = scheduler.kv_cache_manager
        return {
            "vllm_version": vllm.__version__.split("+")[0],
            "scheduler": f"{base.__module__}.{base.__qualname__}",
            "async_scheduling": bool(config.async_scheduling),
            "num_blocks": manager.block_pool.num_gpu_blocks,
            "usable_blocks": manager.block_pool.get_num_free_blocks(),
            "block_size": scheduler.block_size,
            "hash_block_size": scheduler.hash_block_size,
            "max_num_seqs": scheduler.max_num_running_reqs,
            "max_num_active_seqs": scheduler.max_num_active_reqs,
            "max_num_batched_tokens": config.max_num_batched_tokens,
            "max_num_scheduled_tokens": scheduler.max_num_scheduled_tokens,
            "max_model_len": scheduler.max_model_len,
            "enable_prefix_caching": manager.enable_caching,
            "enable_chunked_prefill": config.enable_chunked_prefill,
            "policy": scheduler.policy.value,
            "long_prefill_token_threshold": config.long_prefill_token_threshold,
            "long_prefill_token_threshold_adaptive": scheduler.adaptive_long_prefill_threshold,
            "scheduler_reserve_full_isl": scheduler.scheduler_reserve_full_isl,
            "watermark": config.watermark,
            "watermark_blocks": manager.watermark_blocks,
        }

    def add(self, line: dict[str, Any]) -> None:
        """A request arrives: a trace's request line."""
        from vllm.sampling_params import SamplingParams
        from vllm.v1.request import Request

        tokens = [
            segment * _SEGMENT + k for segment, length in line["prompt"] for k in range(length)
        ]
        self._out_segments[line["id"]] = line["out_seg"]
        self._scheduler.add_request(
            Request(
                request_id=line["id"],
                prompt_token_ids=tokens,
                sampling_params=SamplingParams(
                    max_tokens=line["output_tokens"], ignore_eos=True, temperature=0.0
                ),
                pooling_params=None,
                arrival_time=line["arrival_time"],
                priority=line["priority"],
                block_hasher=self._hasher,
            )
        )

    def abort(self, request_id: str) -> None:
        """A client leaves."""
        from vllm.v1.request import RequestStatus

        self._scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)

    def schedule(self, _: object) -> dict[str, Any]:
        """Form the next batch: a step line's fields up to `hashes`."""
        scheduler = self._scheduler
        before = {request.request_id for request in scheduler.running}
        self._preempted.clear()
        output = scheduler.schedule()
        tokens = output.num_scheduled_tokens
        if tokens:
            samples = {id for id in tokens if not scheduler.requests[id].is_prefill_chunk}
            self._in_flight.append((output, samples))
        admitted = [r for r in scheduler.running if r.request_id not in before]
        pool = scheduler.kv_cache_manager.block_pool
        return {
            "scheduled": list(tokens.items()),
            "new": [r.request_id for r in admitted if not r.num_preemptions],
            "resumed": [r.request_id for r in admitted if r.num_preemptions],
            "preempted": list(self._preempted),
            "cached": [
                (r.request_id, r.num_computed_tokens - tokens[r.request_id]) for r in admitted
            ],
            "running": [r.request_id for r in scheduler.running],
            "computed": [r.num_computed_tokens for r in scheduler.running],
            "waiting": [r.request_id for r in scheduler.waiting],
            "free_blocks": pool.get_num_free_blocks(),
            "hashes": len(pool.cached_block_hash_to_block),
        }

    def update(self, _: object) -> list[str]:
        """Process the output of the oldest batch; the ids it ended, in order."""
        from vllm.v1.outputs import ModelRunnerOutput

        output, samples = self._in_flight.popleft()
        ids = list(output.num_scheduled_tokens)
        requests = self._scheduler.requests
        alive = [requests[id] for id in ids if id in requests]
        self._scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=ids,
                req_id_to_index={id: index for index, id in enumerate(ids)},
                sampled_token_ids=[self._sampled(id) if id in samples else [] for id in ids],
            ),
        )
        return [request.request_id for request in alive if request.is_finished()]

    def freeq_crc(self, _: object) -> int:
        """CRC-32 of the free queue's block numbers."""
        free = self._scheduler.kv_cache_manager.block_pool.free_block_queue.get_all_free_blocks()
        return zlib.crc32(",".join(str(block.block_id) for block in free).encode())

    def state(self) -> dict[str, Any]:
        """What `StepEngine` shows between the calls."""
        return {
            "has_requests": self._scheduler.get_num_unfinished_requests() > 0,
            "batches_in_flight": len(self._in_flight),
            "free_blocks": self._scheduler.kv_cache_manager.block_pool.get_num_free_blocks(),
        }

    def _sampled(self, request_id: str) -> list[int]:
        """The token that the model makes, after those that the request has."""
        request = self._scheduler.requests.get(request_id)
        if request is None:  # aborted meanwhile
            return []
        return [self._out_segments[request_id] * _SEGMENT + request.num_output_tokens]


def serve(calls: TextIO, answers: TextIO) -> None:
    """Answer calls until there are no more. `new` replaces the engine by a fresh one."""
    engine: GoldenEngine | None = None
    for line in calls:
        method, argument = json.loads(line)
        try:
            if method == "new" or engine is None:
                engine, result = GoldenEngine(argument), None
            else:
                result = getattr(engine, method)(argument)
            answer = {"result": result, "state": engine.state()}
        except Exception as error:
            in_one_line = " ".join(str(error).split())
            answer = {"error": f"{type(error).__name__}: {in_one_line}"}
        answers.write(json.dumps(answer, separators=(",", ":")) + "\n")
        answers.flush()


def main() -> None:
    """Serve on stdin and stdout; what vLLM itself prints goes to stderr."""
    os.environ.update(_OFFLINE)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    from vllm import __version__

    answers.write(json.dumps(__version__) + "\n")
    answers.flush()
    serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
