"""Requests whose adapter goes away or is replaced while they wait."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

from vllm_pedro import PedroRequest
from vllm_pedro.integration.frontend.prompt_length import RefusedRequestError
from vllm_pedro.integration.frontend.readmission import (
    ATTEMPTS,
    _generate,
    for_beams,
)
from vllm_pedro.integration.request import ServedPedroRequest
from vllm_pedro.integration.wire import put_failure


def output(text="token", finish_reason=None, stop_reason=None):
    completion = SimpleNamespace(text=text, finish_reason=finish_reason, stop_reason=stop_reason)
    return SimpleNamespace(outputs=[completion])


GONE = output("", "error")
put_failure(GONE.outputs[0], "/secret/x: the files changed")


def served(digest="one", **fields):
    return ServedPedroRequest("name", 1, "/secret/x", digest=digest, **fields)


class Models:
    """What names stand for."""

    def __init__(self, current, renewed="two"):
        self.current, self.renewed = current, renewed

    def pedro_current(self, request):
        return served(self.current) if self.current else request

    async def pedro_renew(self, old):
        return served(self.renewed)


def run(answers, adapter, current=None):
    """What a client gets from engines that answer so, one after the other; adapters they saw."""
    seen, closed = [], []

    def start(request):
        answer = answers[len(seen)]
        seen.append(request)

        async def outputs():
            try:
                for item in answer:
                    if isinstance(item, Exception):
                        raise item
                    yield item
            finally:
                closed.append(request)

        return outputs()

    async def collect():
        got = []
        try:
            async for item in _generate(start, adapter, Models(current)):
                got.append(item.outputs[0].text)
        except RefusedRequestError as error:
            got.append(error)
        return got

    got = asyncio.run(collect())
    assert len(closed) == len(seen)
    return got, [getattr(s, "digest", None) for s in seen]


def test_an_answer_passes_through():
    assert run([[output("a"), output("b", "stop")]], served()) == (["a", "b"], ["one"])


def test_the_content_is_that_of_the_last_moment():
    assert run([[output("a", "stop")]], served(), current="newer") == (["a"], ["newer"])
    # A beam's content was fixed when its search began.
    beam = served(is_pinned=True)
    assert run([[output("a", "stop")]], beam, current="newer") == (["a"], ["one"])


def test_a_request_that_has_not_begun_is_admitted_again_with_what_its_name_means_now():
    answers = [[GONE], [GONE], [output("a", "stop")]]
    assert run(answers, served()) == (["a"], ["one", "two", "two"])


def test_an_error_of_another_kind_is_left_alone():
    other = output("", "error")
    assert run([[other]], served()) == ([""], ["one"])


def test_a_request_that_has_begun_ends_with_a_reason_that_names_no_folder():
    got, seen = run([[output("a"), GONE]], served())
    assert got[0] == "a"
    assert "adapter 'name'" in str(got[1])
    assert "secret" not in str(got[1])
    assert seen == ["one"]


def test_beams_keep_their_adapter():
    got, seen = run([[GONE]], served(is_pinned=True))
    assert isinstance(got[0], RefusedRequestError)
    assert seen == ["one"]


def test_it_is_not_tried_for_ever():
    got, seen = run([[GONE]] * 10, served())
    assert isinstance(got[0], RefusedRequestError)
    assert len(seen) == ATTEMPTS


def test_a_library_user_learns_the_folder():
    got, _ = run([[GONE]] * ATTEMPTS, PedroRequest("name", 1, "/secret/x"))
    assert "/secret/x: the files changed" in str(got[0])


def test_a_request_with_a_prompt_length_takes_the_new_content_as_any_other():
    answers = [[GONE], [output("a", "stop")]]
    assert run(answers, served(prompt_length=5)) == (["a"], ["one", "two"])


def test_beams_are_pinned_and_have_the_first_prompts_length():
    request = for_beams(served(pools="all"), 7)
    assert (request.prompt_length, request.digest, request.pools) == (7, "one", "all")
    assert request.is_pinned
    assert for_beams(request, 9).prompt_length == 7
