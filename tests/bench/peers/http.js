// Serves keep-alive connections with Node's cluster and `http`. Usage: node http.js WORKERS
//
// At SIGHUP, the master forks new workers. When all of them listen, it disconnects the old ones.
'use strict';

const cluster = require('cluster');
const http = require('http');

const workers = Number(process.argv[2]);

// Forks workers, and calls `done` with their address when all of them listen.
function forkWorkers(done) {
  let listening = 0;
  for (let i = 0; i < workers; i++) {
    cluster.fork().on('listening', ({ address, port }) => {
      listening += 1;
      if (listening === workers) {
        done(`${address}:${port}`);
      }
    });
  }
}

if (cluster.isMaster) {
  forkWorkers((address) => console.log(`listening on ${address}`));
  process.on('SIGHUP', () => {
    const old = Object.values(cluster.workers);
    forkWorkers(() => old.forEach((worker) => worker.disconnect()));
  });
} else {
  const server = http.createServer((request, response) => {
    response.setHeader('Content-Length', 12);
    response.end('hello world\n');
  });
  server.keepAliveTimeout = 3600 * 1000;
  server.listen(0, '127.0.0.1');
}
