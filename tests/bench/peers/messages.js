// Messages of 32 bytes with Node's cluster, for a second: node messages.js there-and-back|one-way
//
// Prints how many a second came to the callback: of the worker, or of the master.
'use strict';

const cluster = require('cluster');

const MESSAGE = 'm'.repeat(32);
const WARM_UP = 300;
const TIME = 1000;

// Counts, and says how many there were in the time after the warm-up.
function counter(done) {
  let count = 0;
  let begun;
  setTimeout(() => {
    count = 0;
    begun = process.hrtime.bigint();
  }, WARM_UP);
  setTimeout(() => done((count * 1e9) / Number(process.hrtime.bigint() - begun)), WARM_UP + TIME);
  return () => {
    count += 1;
  };
}

function tell(rate) {
  console.log(`a second: ${rate}`);
  process.exit();
}

if (cluster.isMaster) {
  const worker = cluster.fork();
  if (process.argv[2] === 'there-and-back') {
    worker.on('message', (message) => worker.send(message));
    worker.on('exit', () => process.exit());
  } else {
    worker.on('online', () => worker.on('message', counter(tell)));
  }
} else if (process.argv[2] === 'there-and-back') {
  const count = counter(tell);
  process.on('message', (message) => {
    count();
    process.send(message);
  });
  process.send(MESSAGE);
} else {
  // As fast as they go, but no faster: the next ones are sent when these have been written.
  const send = () => {
    for (let i = 0; i < 99; i++) {
      process.send(MESSAGE);
    }
    process.send(MESSAGE, send);
  };
  send();
}
