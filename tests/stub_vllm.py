"""A program with vLLM's command line that serves at once: `stub_vllm.py WEIGHTS --port N ...`.

It answers every completion with one token.
"""

import asyncio
import sys

from aiohttp import web


async def complete(request: web.Request) -> web.Response:
    """An answer of one token."""
    await request.read()
    choice = {"index": 0, "text": "x", "finish_reason": "length"}
    return web.json_response({"choices": [choice], "usage": {"completion_tokens": 1}})


async def healthy(request: web.Request) -> web.Response:
    """Always."""
    return web.Response()


async def serve(port: int) -> None:
    """Until killed."""
    app = web.Application()
    app.router.add_get("/health", healthy)
    app.router.add_post("/v1/completions", complete)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[sys.argv.index("--port") + 1])))
