"""terminado as its documentation sets it up: a WebSocket server with a terminal for each client."""

import asyncio

import tornado.web
from terminado import TermSocket, UniqueTermManager


async def main():
    terminals = UniqueTermManager(shell_command=["bash"])
    app = tornado.web.Application([("/terminal", TermSocket, {"term_manager": terminals})])
    listening = tornado.httpserver.HTTPServer(app)
    sockets = tornado.netutil.bind_sockets(0, "127.0.0.1")
    listening.add_sockets(sockets)
    print(sockets[0].getsockname()[1], flush=True)
    try:
        await asyncio.Event().wait()
    finally:
        await terminals.shutdown()


if __name__ == "__main__":
    asyncio.run(main())
