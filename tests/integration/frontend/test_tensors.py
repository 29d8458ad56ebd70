"""What the development route holds of the bodies that are sent to it."""

from __future__ import annotations

import asyncio

from vllm_pedro.integration.frontend.tensors import MOST_BODIES, Bodies


async def pieces(*sizes, gate=None):
    for size in sizes:
        yield bytes(size)
    if gate is not None:
        await gate.wait()


def test_bodies_are_bounded_each_and_together():
    async def run():
        bodies, gate = Bodies(), asyncio.Event()

        async def send(*sizes, gate=None):
            async with bodies.receive(pieces(*sizes, gate=gate), 100) as (body, size):
                return None if body is None else len(body), size

        assert await send(60, 40) == (100, 100)
        assert await send(60, 41, 10) == (None, 111)
        slow = [asyncio.ensure_future(send(100, gate=gate)) for _ in range(MOST_BODIES)]
        await asyncio.sleep(0)
        assert await send(1) == (None, 1)  # at once, and nobody waits
        gone = slow.pop()
        gone.cancel()
        await asyncio.sleep(0)
        assert await send(50, 50) == (100, 100)
        gate.set()
        assert await asyncio.gather(*slow) == [(100, 100)] * len(slow)
        assert bodies._held == 0

    asyncio.run(run())
