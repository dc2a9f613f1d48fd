// Sends messages of 32 bytes with Node's cluster. Usage: node messages.js round-trip|one-way
//
// Prints a line when the counting starts, and then the number of messages that the callback
// received within a second. The worker counts round trips, and the master counts one-way messages.
// The program runs until it is killed.
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

const roundTrip = process.argv[2] === 'round-trip';

if (cluster.isMaster) {
  const worker = cluster.fork();
  if (roundTrip) {
    worker.on('message', (message) => worker.send(message));
  } else {
    worker.on('message', counter());
  }
} else if (roundTrip) {
  const count = counter();
  process.on('message', (message) => {
    count();
    process.send(message);
  });
  process.send(MESSAGE);
} else {
  // Send 100 messages at a time. The callback of the last message sends the next 100.
  const send = () => {
    for (let i = 0; i < 99; i++) {
      process.send(MESSAGE);
    }
    process.send(MESSAGE, send);
  };
  send();
}
