"""Tornado's TCPServer and IOStream. The modes are those of peer.h, without file."""

import asyncio
import sys

from tornado.iostream import StreamClosedError
from tornado.tcpserver import TCPServer

MODE = sys.argv[2] if len(sys.argv) > 2 else "line"
CONTENT = memoryview(open(sys.argv[3], "rb").read()) if MODE == "write" else b""


class Echo(TCPServer):
    async def handle_stream(self, stream, address):
        stream.set_nodelay(True)
        try:
            while True:
                if MODE == "chunk":
                    stream.write(await stream.read_bytes(65536, partial=True))
                    continue
                line = await stream.read_until(b"\n")
                stream.write(CONTENT if MODE == "write" else line)
                if MODE == "once":
                    return stream.close()
        except StreamClosedError:
            pass


async def main():
    server = Echo(read_chunk_size=65536, max_buffer_size=1 << 30)
    server.listen(int(sys.argv[1]), "127.0.0.1", backlog=4096)
    await asyncio.Event().wait()

asyncio.run(main())
