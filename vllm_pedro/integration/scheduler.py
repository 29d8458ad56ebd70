"""Rules 1 and 2 where they are decided: whole prompts, and cache hits short of the pooled token.

Subclasses of vLLM's schedulers, chosen through `SchedulerConfig.scheduler_cls`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from ..serving.adapters import AdapterBank
from ..serving.admission import Admission, Turn
from ..serving.blobs import ALIGNMENT
from ..serving.loading import Prefetches
from ..serving.rows import Assignment, VectorKey, VectorRows
from ..serving.spec import RequestSpec
from ..serving.stats import merge_stats
from . import wire
from .offloading import Offloading
from .options import draft_places, options_of

WAITING = (RequestStatus.WAITING, RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR)
"""Of a request that was never scheduled."""

SETTLE_SECONDS = 0.005
"""Where nothing runs, a step waits so long for adapters that are about to be there: their prompts
would else take a step of their own."""


class PedroSchedulerMixin:
    """What both schedulers do differently for requests with an adapter."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)  # type: ignore[call-arg]
        options = options_of(vllm_config)
        assert options is not None
        self._pedro_max_adapters = options.max_pedros
        assert options.pedro_memory_bytes is not None
        self._pedro_memory = options.pedro_memory_bytes // ALIGNMENT * ALIGNMENT
        self._pedro_rows = VectorRows(vllm_config.scheduler_config.max_num_seqs)
        # What this step would admit: request -> whether its vectors are cached, and the adapters
        # whose generators it would run, with the bytes that each takes.
        self._pedro_entering: dict[str, bool] = {}
        self._pedro_step_adapters: dict[str, int] = {}
        # The folder of the adapter with which this step would generate vectors.
        self._pedro_step_folders: dict[VectorKey, str] = {}
        self._pedro_admission = Admission(
            self.max_num_scheduled_tokens,  # type: ignore[attr-defined]
            vllm_config.scheduler_config.max_num_batched_tokens,
            draft_places(vllm_config.speculative_config),
        )
        # Half of what holds them, so that they do not put one another out.
        self._pedro_prefetches = Prefetches(
            self._pedro_memory // 2, max(1, min(32, options.max_cpu_pedros or 32) // 2)
        )
        self._pedro_offloading = Offloading(self.connector)  # type: ignore[attr-defined]
        # The worker's, once it has had a request, if it is in this process.
        self.pedro_bank: AdapterBank | None = None
        self._pedro_pools = vllm_config.model_config.runner_type == "pooling"
        self._pedro_chunks = bool(vllm_config.scheduler_config.enable_chunked_prefill)
        # What this step's encoder may compute for the requests that were not asked yet.
        self._pedro_encoder_left = 0
        # Counts that wait for the next statistics.
        self._pedro_stats: dict[str, Any] = {}

    def add_request(self, request: Any) -> None:
        spec = wire.spec_of_request(request)
        if spec is not None and not self._pedro_rows.has(spec.vector_key):
            self._pedro_prefetches.want(request.request_id, spec)
        super().add_request(request)  # type: ignore[misc]
        self._pedro_offloading.hold(request)

    def pedro_replace(
        self,
        name: str,
        path: str,
        digest: str,
        pools: str,
        nbytes: int,
        scope: str,
    ) -> int:
        """A name stands for other content: give it to the requests that have not begun.

        They keep their places in the queue. Those that have begun, preempted ones too, finish on
        the content they have.

        Returns:
            How many requests it reached.
        """
        count = 0
        for request in self.requests.values():  # type: ignore[attr-defined]
            old: RequestSpec | None = request.pedro
            if old is None or old.name != name or old.digest == digest or old.is_pinned:
                continue
            if request.status not in WAITING or request.num_computed_tokens:
                continue
            new = replace(
                old,
                path=path,
                digest=digest,
                pools=pools,
                nbytes=nbytes,
                scope=scope,
            )
            if scope == "sequence" and new.pooled_end > self.max_num_scheduled_tokens:  # type: ignore[attr-defined]
                continue  # it was admitted for content that needs no whole prompt
            request.pedro = new
            self._pedro_prefetches.want(request.request_id, new)
            wire.put_spec(wire.params_of(request), new)
            request.block_hashes.clear()
            request.update_block_hashes()
            count += 1
        return count

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        self._pedro_entering.clear()
        self._pedro_step_adapters.clear()
        self._pedro_step_folders.clear()
        if self.pedro_bank is not None and not self.running:  # type: ignore[attr-defined]
            self.pedro_bank.loader.settle(SETTLE_SECONDS)
        self._pedro_encoder_left = self.max_num_encoder_input_tokens  # type: ignore[attr-defined]
        self._pedro_admission.begin_step(self._pedro_turns())
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        entering = [
            i
            for i in self._pedro_entering
            if i in output.num_scheduled_tokens and self._pedro_is_entered(i)
        ]
        # Those whose vectors are cached come first: the others may evict rows that nobody reads.
        entering.sort(key=lambda i: not self._pedro_entering[i])
        wire.put_assignments(output, {i: self._pedro_assign(i) for i in entering})
        for request_id in entering:
            if self._pedro_rows.is_generated_for(request_id):
                self._pedro_offloading.release(request_id)
            self._pedro_admission.forget(request_id)
            self._pedro_prefetches.forget(request_id)
        wire.put_prefetches(output, self._pedro_prefetches.take())
        return output

    def _pedro_turns(self) -> Iterable[Turn]:
        """The prompts for which this step's tokens may be reserved."""
        if len(self.running) >= self.max_num_active_reqs:  # type: ignore[attr-defined]
            return
        for request_id in self._pedro_admission.candidates():
            request = self.requests[request_id]  # type: ignore[attr-defined]
            spec: RequestSpec = request.pedro
            tokens = max(1, spec.pooled_end - self._pedro_first_whole(spec))
            yield Turn(request_id, tokens, request.priority)

    def _pedro_first_whole(self, spec: RequestSpec) -> int:
        """From which token on a prompt has to come in one step; some heads take no chunks."""
        return spec.first_scaled if self._pedro_chunks else 0

    def _pedro_is_entered(self, request_id: str) -> bool:
        """Whether the step computes a token that the request's adapter scales."""
        request = self.requests[request_id]  # type: ignore[attr-defined]
        return bool(request.num_computed_tokens > request.pedro.first_scaled)

    def _pedro_assign(self, request_id: str) -> Assignment:
        spec: RequestSpec = self.requests[request_id].pedro  # type: ignore[attr-defined]
        return self._pedro_rows.acquire(request_id, spec.vector_key, spec.path)

    def _preempt_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
        """Also mends a defect of vLLM 0.32 for requests with an adapter.

        Under the priority policy a request may be preempted in the step that already scheduled it.
        Its new blocks are in the prefix cache by then, but are never computed.
        """
        if request.pedro is not None:
            self._pedro_evict(request.request_id, request.num_computed_tokens)
        self._pedro_free(request)
        self._pedro_offloading.hold(request)
        super()._preempt_request(request, *args, **kwargs)  # type: ignore[misc]

    def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        self._pedro_free(request)
        self._pedro_admission.forget(request.request_id)
        self._pedro_prefetches.forget(request.request_id)
        result = super()._free_request(request, *args, **kwargs)  # type: ignore[misc]
        self._pedro_offloading.forget(request.request_id)
        return result

    def _pedro_free(self, request: Any) -> None:
        request_id = request.request_id
        if self._pedro_rows.is_read_by(request_id):
            if not self._pedro_rows.is_generated_for(request_id):
                # The request ends before its step has returned, so its blocks may be unfilled.
                self._pedro_evict(request_id, request.pedro.first_scaled)
            self._pedro_rows.free(request_id)

    def _pedro_evict(self, request_id: str, num_computed_tokens: int = 0) -> None:
        """Let nobody find this request's KV blocks past these tokens in the prefix cache."""
        manager = self.kv_cache_manager  # type: ignore[attr-defined]
        groups = zip(
            manager.get_block_ids(request_id),
            manager.coordinator.single_type_managers,
            strict=True,
        )
        manager.evict_blocks(
            {b for ids, group in groups for b in ids[num_computed_tokens // group.block_size :]}
        )

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's way to say that the weights changed."""
        self._pedro_rows.invalidate_all()
        return super().reset_prefix_cache(*args, **kwargs)  # type: ignore[misc]

    def _get_local_prefix_cache_hit(
        self, request: Any, *longest: Any
    ) -> tuple[Any, int, int, bool]:
        """Without cached vectors, stop a hit before the pooled token, whose states generate them.

        A hit of the whole prompt is possible where tokens follow it: beams, later turns, a resumed
        request. The shorter hit is looked up anew rather than cut from the longer one, because
        sliding-window layers keep only the blocks that the longer one needs.
        """
        spec: RequestSpec | None = request.pedro
        manager = self.kv_cache_manager  # type: ignore[attr-defined]
        if spec is None or spec.is_static or self._pedro_rows.has(spec.vector_key):
            return super()._get_local_prefix_cache_hit(request, *longest)  # type: ignore[misc]
        if spec.pools == "all":
            return manager.empty_kv_cache_blocks, 0, 0, False
        # vLLM 0.33 says how long a hit may be at most.
        hit = super()._get_local_prefix_cache_hit(request, *longest)  # type: ignore[misc]
        if hit[1] < spec.prompt_length:
            return hit
        found, num_hit, num_uncached = manager.coordinator.find_longest_cache_hit(
            request.block_hashes, spec.prompt_length - 1
        )
        boundary = num_hit + num_uncached if num_uncached else 0
        return manager.create_kv_cache_blocks(found), num_hit, boundary, hit[3]

    def _ec_transfer_pending(self, request: Any, num_computed_tokens: int) -> bool:
        """Pass over a prompt that does not fit this step, or whose adapter is on its way.

        Those behind it may start.

        Of the functions that vLLM's waiting loop asks whether to skip a request, this is the one
        that is called when the request's cache hit is known.
        """
        if super()._ec_transfer_pending(request, num_computed_tokens):  # type: ignore[misc]
            return True
        admission, request_id = self._pedro_admission, request.request_id
        if admission.is_before_turn(request_id, request.priority):
            return True
        spec: RequestSpec | None = request.pedro
        if spec is None or num_computed_tokens < self._pedro_first_whole(spec):
            return False  # tokens before the pooled one are the backbone's
        if self._pedro_hangs_on_another_folder(spec):
            return True
        if self._pedro_rows.has(spec.vector_key):
            return False
        if not self._pedro_is_due(request_id, spec):
            return True
        fits = num_computed_tokens + admission.left >= spec.pooled_end
        fits = fits and self._pedro_encodes(request, num_computed_tokens, spec.pooled_end)
        if fits and self._pedro_has_room_for(spec):
            return False
        admission.pass_over(request_id)
        return True

    def _pedro_is_due(self, request_id: str, spec: RequestSpec, is_urgent: bool = False) -> bool:
        """See `Prefetches.is_due`; what is in this process is seen before it is reported."""
        if self.pedro_bank is not None and self.pedro_bank.is_at_hand(spec):
            return True
        return self._pedro_prefetches.is_due(request_id, spec, is_urgent)

    def _pedro_hangs_on_another_folder(self, spec: RequestSpec) -> bool:
        """Whether its vectors are being generated with the same content from another folder.

        That one may be gone, which ends its own requests alone.
        """
        key = spec.vector_key
        folder = self._pedro_rows.folder_of(key) or self._pedro_step_folders.get(key)
        return folder not in (None, spec.path)

    def _pedro_encodes(self, request: Any, start: int, end: int) -> bool:
        """Whether this step can encode what is in these tokens of a prompt, all of it."""
        if not request.has_encoder_inputs:
            return True
        manager = self.encoder_cache_manager  # type: ignore[attr-defined]
        wanted, room = {}, manager.num_freeable_slots
        for image in request.mm_features:
            place = image.mm_position
            if place.offset < end and start < place.offset + place.length:
                wanted[image.identifier] = place.get_num_embeds()
        room -= sum(manager.freeable.get(identifier, 0) for identifier in wanted)
        needed = sum(n for identifier, n in wanted.items() if identifier not in manager.cached)
        return needed <= min(room, self._pedro_encoder_left)

    def _try_schedule_encoder_inputs(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        """Note what is left of the encoder's budget."""
        found = super()._try_schedule_encoder_inputs(request, *args, **kwargs)  # type: ignore[misc]
        self._pedro_encoder_left = found[2]
        return found

    def _pedro_has_room_for(self, spec: RequestSpec) -> bool:
        """One step's prompts read their generators from the device's memory for adapters."""
        adapters = self._pedro_step_adapters
        if spec.digest in adapters:
            return True
        if self._pedro_max_adapters is not None and len(adapters) >= self._pedro_max_adapters:
            return False
        return sum(adapters.values()) + spec.nbytes <= self._pedro_memory

    def _reserve_prefill_lookahead(
        self, request: Any, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        """Keep the first P tokens in one step; called after every other cap on a request's tokens.

        Returning 0 leaves a running request for the next step, and ends the waiting loop. Where the
        vectors are cached, the tokens may come in any portions, and so may those that are not
        scaled: the step that computes token P - 1 generates the vectors.
        """
        num_new_tokens = super()._reserve_prefill_lookahead(  # type: ignore[misc]
            request, num_computed_tokens, num_new_tokens
        )
        admission, request_id = self._pedro_admission, request.request_id
        spec: RequestSpec | None = request.pedro
        if request.status == RequestStatus.RUNNING:
            num_new_tokens = admission.portion(num_new_tokens, request.is_prefill_chunk)
        if spec is not None and spec.scope == "answer":
            num_new_tokens = self._pedro_portion(request, spec, num_computed_tokens, num_new_tokens)
        elif spec is not None and request.status != RequestStatus.RUNNING:
            cached = self._pedro_rows.has(spec.vector_key)
            if not cached:
                # It fits, see above, unless another cap came between.
                is_whole = num_computed_tokens + num_new_tokens >= spec.pooled_end
                if not is_whole or not self._pedro_has_room_for(spec):
                    admission.pass_over(request_id)
                    self._pedro_unpin(request)
                    return 0
                self._pedro_step_adapters[spec.digest] = spec.nbytes
                self._pedro_step_folders[spec.vector_key] = spec.path
            if num_new_tokens:
                self._pedro_entering[request_id] = cached
                admission.started(request_id)
        if not num_new_tokens:
            self._pedro_unpin(request)
        admission.take(num_new_tokens)
        return num_new_tokens

    def _pedro_unpin(self, request: Any) -> None:
        """A prompt that goes on waiting does not hold the images that are cached.

        Upstream it does, which is harmless where no other prompt may start before it.
        """
        if request.has_encoder_inputs and request.status != RequestStatus.RUNNING:
            self.encoder_cache_manager.free(request)  # type: ignore[attr-defined]

    def _pedro_portion(self, request: Any, spec: RequestSpec, computed: int, tokens: int) -> int:
        """How many of these tokens a request of scope "answer" may take: up to the pooled one, if
        its vectors cannot be generated in this step.
        """
        admission, request_id = self._pedro_admission, request.request_id
        is_past = computed + tokens > spec.first_scaled
        if tokens and is_past and not self._pedro_rows.is_read_by(request_id):
            if self._pedro_hangs_on_another_folder(spec):
                return max(0, self._pedro_first_whole(spec) - computed)
            cached = self._pedro_rows.has(spec.vector_key)
            if not cached:
                is_running = request.status == RequestStatus.RUNNING
                is_due = self._pedro_is_due(request_id, spec, is_urgent=is_running)
                if not is_due or not self._pedro_has_room_for(spec):
                    return max(0, self._pedro_first_whole(spec) - computed)
                self._pedro_step_adapters[spec.digest] = spec.nbytes
                self._pedro_step_folders[spec.vector_key] = spec.path
            self._pedro_entering[request_id] = cached
        if tokens and request.status != RequestStatus.RUNNING:
            admission.started(request_id)
        return tokens

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """End the requests whose adapter failed to load; drop what they computed."""
        report = wire.report_of(model_runner_output)
        self._pedro_prefetches.report(report.loaded, report.lost)
        merge_stats(self._pedro_stats, report.stats)
        dropped: dict[str, str] = {}
        for request_id, assignment in wire.assignments_of(scheduler_output).items():
            if not assignment.must_generate:
                continue
            if request_id not in report.failed:
                for reader in self._pedro_rows.confirm(assignment):
                    self._pedro_offloading.release(reader)
                continue
            for reader in self._pedro_rows.fail(assignment):
                self._pedro_fail(reader, model_runner_output)
                dropped[reader] = report.failed[request_id]
        outputs = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        if dropped:
            for client in outputs.values():
                for output in client.outputs:
                    if output.request_id in dropped and output.finish_reason is not None:
                        wire.put_failure(output, dropped[output.request_id], self._pedro_pools)
        return outputs

    def make_stats(self, *args: Any, **kwargs: Any) -> Any:
        stats = super().make_stats(*args, **kwargs)  # type: ignore[misc]
        counts, self._pedro_stats = self._pedro_stats, {}
        if counts and stats is not None:  # None where statistics are off
            wire.put_stats(stats, counts)
        return stats

    def _pedro_fail(self, request_id: str, model_runner_output: Any) -> None:
        index = model_runner_output.req_id_to_index.get(request_id)
        if index is not None and model_runner_output.sampled_token_ids:
            model_runner_output.sampled_token_ids[index] = []
        if index is not None and model_runner_output.pooler_output:
            model_runner_output.pooler_output[index] = None
        model_runner_output.prompt_logprobs_dict.pop(request_id, None)
        # Computed without vectors, but keyed as if with them.
        self._pedro_evict(request_id, self.requests[request_id].pedro.first_scaled)  # type: ignore[attr-defined]
        failed = self.grammar_compile_error_reqs  # type: ignore[attr-defined]
        if isinstance(failed, dict):  # vLLM 0.33 keeps the errors, too
            failed[request_id] = None
        else:
            failed.add(request_id)


class PedroScheduler(PedroSchedulerMixin, Scheduler):
    """vLLM's scheduler with PEDRO's rules."""


class PedroAsyncScheduler(PedroSchedulerMixin, AsyncScheduler):
    """vLLM's asynchronous scheduler with PEDRO's rules."""


def scheduler_path(async_scheduling: bool) -> str:
    """Qualified name for `SchedulerConfig.scheduler_cls`."""
    cls = PedroAsyncScheduler if async_scheduling else PedroScheduler
    return f"{cls.__module__}.{cls.__qualname__}"
