// Question 2: does a stop complete within DEADLINE, whatever the workers do?
//
// Each case has one worker, which is idle, busy (a connection is open), looping, or stopped by
// SIGSTOP. The stop is `cluster.disconnect()`, `worker.disconnect()` or `worker.kill()`. The stop
// is complete when the worker has exited. For `cluster.disconnect()`, the callback must also have
// run. All cases run in parallel. Looping workers have the lowest priority.
'use strict';

const cluster = require('cluster');
const os = require('os');
const ask = require('./ask');

const ROUNDS = 2;
const DEADLINE = 5000;
const KINDS = ['idle', 'busy', 'looping', 'stopped'];
const CALLS = ['cluster.disconnect()', 'worker.disconnect()', 'worker.kill()'];

function loop() {
  os.setPriority(19);
  for (;;);
}

function worker() {
  ask.serve();
  process.on('message', () => process.send('looping', loop));
}

function master([call]) {
  const one = ask.fork(__filename);
  cluster.on('listening', (worker, { port }) => console.log(`listening ${port}`));
  one.on('message', () => console.log('looping'));
  ask.obey((word) => {
    if (word === 'loop') one.send('loop');
    else if (call === CALLS[0]) cluster.disconnect(() => console.log('stopped'));
    else if (call === CALLS[1]) one.disconnect();
    else one.kill();
  });
}

// Returns the duration of the stop in ms, or null if it did not complete.
async function stop(kind, call) {
  const server = ask.master(__filename, [call]);
  const port = +(await server.expect('listening'));
  const [worker] = server.workers;
  const client = kind === 'busy' ? new ask.Client(port) : null;
  if (client) {
    // Remove the client's own handler, because it would close the connection at the answer.
    client.socket.removeAllListeners('data');
    await new Promise((resolve) => client.socket.on('data', resolve));
  } else if (kind === 'looping') {
    server.say('loop');
    await server.expect('looping');
  } else if (kind === 'stopped') {
    ask.kill(worker, 'SIGSTOP');
  }
  const start = Date.now();
  server.say('stop');
  const called = call === CALLS[0] ? server.line('stopped', DEADLINE) : true;
  const gone = await ask.until(() => !ask.alive(worker), DEADLINE);
  const ended = (await called) !== null && gone;
  const took = Date.now() - start;
  if (client) client.drop();
  await server.end();
  return ended ? took : null;
}

async function questions() {
  const rows = CALLS.map((call) =>
    Promise.all(
      KINDS.map(async (kind) => {
        const times = await Promise.all(Array.from({ length: ROUNDS }, () => stop(kind, call)));
        const ended = times.filter((time) => time !== null);
        const slowest = ended.length ? ` (${Math.max(...ended)} ms at most)` : '';
        return `${kind} ${ended.length} of ${ROUNDS}${slowest}`;
      }),
    ),
  );
  for (const [index, row] of rows.entries()) {
    const text = (await row).join('; ');
    ask.row(`2 completed within ${DEADLINE / 1000} s: ${CALLS[index]}`, text, ROUNDS * KINDS.length);
  }
}

if (cluster.isWorker) worker();
else if (process.argv[2] === 'master') master(process.argv.slice(3));
else ask.run(questions);
