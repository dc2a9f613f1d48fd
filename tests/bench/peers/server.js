// Sends the same answer as the other measured servers, with Node's cluster. Usage: node server.js
// rr|none WORKERS
//
// The program uses plain `net`, because each connection would cost Node far more with `http`.
'use strict';

const cluster = require('cluster');
const net = require('net');

const [policy, workers] = process.argv.slice(2);
const ANSWER =
  'HTTP/1.1 200 OK\r\nContent-Length: 12\r\nConnection: close\r\n\r\nhello world\n';

if (cluster.isMaster) {
  cluster.schedulingPolicy = policy === 'rr' ? cluster.SCHED_RR : cluster.SCHED_NONE;
  let listening = 0;
  cluster.on('listening', (worker, { address, port }) => {
    listening += 1;
    if (listening === Number(workers)) {
      console.log(`listening on ${address}:${port}`);
    }
  });
  for (let i = 0; i < Number(workers); i++) {
    cluster.fork();
  }
} else {
  const serve = (connection) => {
    let request = '';
    connection.on('error', () => {});
    connection.on('data', (data) => {
      request += data.toString('latin1');
      if (request.endsWith('\r\n\r\n')) {
        connection.end(ANSWER);
      }
    });
  };
  net.createServer(serve).listen(0, '127.0.0.1');
}
