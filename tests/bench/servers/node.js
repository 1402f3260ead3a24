/* Node's net: split at the delimiter, corked around the lines of one chunk. The modes are those of
 * peer.h, without file.
 */
'use strict';
const fs = require('fs');
const net = require('net');
const mode = process.argv[3] || 'line';
const content = mode === 'write' ? fs.readFileSync(process.argv[4]) : null;

function echoLines(socket) {
  let rest = null;
  socket.on('data', (bytes) => {
    if (rest) bytes = Buffer.concat([rest, bytes]);
    rest = null;
    let from = 0;
    let end = bytes.indexOf(10);
    if (end === bytes.length - 1) { /* exactly one line */
      socket.write(bytes);
    } else {
      socket.cork();
      for (; end >= 0; end = bytes.indexOf(10, from)) {
        socket.write(bytes.subarray(from, end + 1));
        from = end + 1;
      }
      socket.uncork();
      if (from < bytes.length) rest = bytes.subarray(from);
    }
    if (mode === 'once' && !rest) socket.end();
  });
}

net.createServer({ noDelay: true }, (socket) => {
  socket.on('error', () => socket.destroy());
  if (mode === 'chunk') socket.on('data', (bytes) => socket.write(bytes));
  else if (mode === 'write') socket.on('data', () => socket.write(content));
  else echoLines(socket);
}).listen({ port: +process.argv[2], host: '127.0.0.1', backlog: 4096 });
