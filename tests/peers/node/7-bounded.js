// Question 7: do the master's memory and descriptors stay constant after the warm-up?
//
// One master each is tested for respawns (a worker listens and receives SIGKILL), for connections
// through one worker, and for message round trips. A tenth of the work is the warm-up. Memory is
// read after the warm-up, halfway and at the end, each time after a requested garbage collection.
'use strict';

const cluster = require('cluster');
const ask = require('./ask');

const WORK = { respawns: 300, connections: 20000, messages: 100000 };
const LANES = 16; // clients at a time, and messages in flight
const FORKS = 2; // workers at a time

function worker() {
  ask.serve();
  process.on('message', (message) => process.send(message));
}

// Calls `one(next)` `times` times, at most `width` at a time, and then `done`.
function lanes(width, times, one, done) {
  let started = 0;
  let ended = 0;
  const next = () => {
    if (ended === times) return done();
    if (started++ < times) one(() => (ended++, next()));
  };
  for (let lane = 0; lane < width; lane++) next();
}

function respawn(next) {
  const worker = ask.fork(ask.RAW, ['listen']);
  worker.on('listening', () => worker.process.kill('SIGKILL'));
  worker.on('exit', next);
}

function master([kind]) {
  const one = kind === 'respawns' ? null : ask.fork(__filename);
  cluster.on('listening', (worker, { port }) => one && console.log(`listening ${port}`));
  const done = () => console.log('done');
  let answered = null;
  if (one) one.on('message', () => answered());
  ask.obey((word, times) => {
    if (word === 'collect') {
      globalThis.gc();
      setTimeout(() => (globalThis.gc(), console.log('collected')), 200);
    } else if (word === 'respawns') {
      lanes(FORKS, +times, respawn, done);
    } else {
      const waiting = [];
      answered = () => waiting.shift()();
      lanes(LANES, +times, (next) => (waiting.push(next), one.send({ text: 'hello' })), done);
    }
  });
}

async function work(server, kind, times, port) {
  if (kind !== 'connections') {
    server.say(`${kind} ${times}`);
    return server.line('done');
  }
  let served = 0;
  await new Promise((resolve) => {
    const one = async (next) => {
      if ((await new ask.Client(port).done) === 'served') served++;
      next();
    };
    lanes(LANES, times, one, resolve);
  });
  return served === times ? '' : null;
}

async function figures(server) {
  server.say('collect');
  await server.expect('collected');
  return [ask.memory(server.pid), ask.descriptors(server.pid)];
}

async function bounded(kind, times) {
  const server = ask.master(__filename, [kind], { flags: ['--expose-gc'] });
  const port = kind === 'respawns' ? null : +(await server.expect('listening'));
  const memory = [];
  const descriptors = [];
  for (const part of [times / 10, times / 2, times / 2]) {
    if ((await work(server, kind, part, port)) === null) throw new Error(`${kind}: not finished`);
    const [mebibytes, number] = await figures(server);
    memory.push(mebibytes);
    descriptors.push(number);
  }
  ask.row(
    `7 bounded: ${times} ${kind}`,
    `memory ${memory.join(' -> ')} MiB; descriptors ${descriptors.join(' -> ')}`,
    1,
  );
  await server.end();
}

async function questions() {
  for (const [kind, times] of Object.entries(WORK)) await bounded(kind, times);
}

if (cluster.isWorker) worker();
else if (process.argv[2] === 'master') master(process.argv.slice(3));
else ask.run(questions);
