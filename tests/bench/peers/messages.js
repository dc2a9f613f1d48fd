// Messages of 32 bytes with Node's cluster: node messages.js there-and-back|one-way
//
// Says when it begins to count, and then how many came to the callback within a second: of the
// worker, or of the master. It goes on until it is ended.
'use strict';

const cluster = require('cluster');

const MESSAGE = 'm'.repeat(32);
const WARM_UP = 300;
const TIME = 1000;

function counter() {
  let count = 0;
  setTimeout(() => {
    console.log('counts');
    count = 0;
    setTimeout(() => console.log(`counted ${count}`), TIME);
  }, WARM_UP);
  return () => {
    count += 1;
  };
}

const thereAndBack = process.argv[2] === 'there-and-back';

if (cluster.isMaster) {
  const worker = cluster.fork();
  if (thereAndBack) {
    worker.on('message', (message) => worker.send(message));
  } else {
    worker.on('message', counter());
  }
} else if (thereAndBack) {
  const count = counter();
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
