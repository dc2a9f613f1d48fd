// Question 4: can one worker end, block or bloat the master?
//
// A well-behaved worker serves clients one after another, each with its own connection through the
// master. The median latency is measured before and while a second worker misbehaves. The second
// worker does not listen, so that all clients reach the first one. The test also records the
// master's memory, its descriptors and whether it survives.
//
// Each senseless message in valid JSON is sent to a new master. The master has survived if it still
// serves ENOUGH clients.
'use strict';

const cluster = require('cluster');
const ask = require('./ask');

const MEASURE = 2000;
const CALM = 400;
const ENOUGH = 10;
const TIMEOUT = 5000; // ms for one client, and for the exit of a master that does not serve
const MIB = 1 << 20;
const SENT_BYTES = 200 * MIB;
const FLOODS = {
  random: '1 MiB of random bytes',
  flood: 'a flood of small messages',
  endless: '200 MiB without an end of line',
  files: '250 files with each message',
  sockets: '250 sockets with each message',
  'never-reads': 'it never reads; the master sends 200 MiB and ignores `false`',
};
const NONSENSE = [
  'null',
  'unasked-acknowledgement',
  'handle-without-descriptor',
  'handle-of-unknown-type',
  'file-as-connection',
  'listen-twice',
  'listen-without-address',
  'listening-without-address',
  'close-of-nothing',
  'unknown-act',
  'reply-to-nothing',
];

function send(worker, message, left) {
  if (left <= 0 || !worker.isConnected()) return;
  worker.send(message);
  setImmediate(send, worker, message, left - message.length);
}

function master() {
  cluster.on('listening', (worker, { port }) => port && console.log(`listening ${port}`));
  // Count messages, like an application that counts its workers' messages.
  let messages = 0;
  cluster.on('message', () => messages++);
  cluster.on('exit', (worker) => worker.id !== 1 && console.log('gone'));
  ask.fork(__filename);
  ask.obey((kind) => {
    if (kind !== 'never-reads') return ask.fork(ask.RAW, ['send', kind]);
    const worker = ask.fork(ask.RAW, ['wait']);
    worker.on('online', () => console.log('attacks'));
    worker.on('online', () => send(worker, 'x'.repeat(65536), SENT_BYTES));
  });
}

// Connects clients one after another for `ms`. Returns their latencies in ms, and the maximum of
// `watch`.
async function latency(server, port, ms, watch = () => 0) {
  const times = [];
  let most = 0;
  let failed = 0;
  const end = Date.now() + ms;
  while (Date.now() < end && server.status === null) {
    const start = performance.now();
    const client = new ask.Client(port);
    const outcome = await Promise.race([client.done, ask.sleep(TIMEOUT), server.ended]);
    if (outcome !== 'served') failed++;
    times.push(performance.now() - start);
    client.drop();
    if (ask.alive(server.self)) most = Math.max(most, watch());
  }
  times.sort((a, b) => a - b);
  return { median: times[times.length >> 1], worst: times.at(-1), failed, most };
}

async function flood(kind) {
  const server = ask.master(__filename);
  const port = +(await server.expect('listening'));
  await latency(server, port, MEASURE / 4); // warm-up
  const before = await latency(server, port, MEASURE / 2);
  const memory = ask.memory(server.pid);
  const descriptors = ask.descriptors(server.pid);
  let peak = memory;
  server.say(kind);
  await server.expect('attacks');
  const during = await latency(server, port, MEASURE, () => {
    peak = ask.memory(server.pid, 'VmHWM');
    return ask.descriptors(server.pid);
  });
  const parts = [];
  const dead = () => server.status !== null;
  if (await ask.until(dead, during.failed ? TIMEOUT : CALM)) {
    parts.push(`the master died: ${await server.complaint()}`);
  } else {
    const ratio = (during.median / before.median).toFixed(1);
    parts.push('the master lives');
    parts.push(`sibling's latency x ${ratio} (worst ${Math.round(during.worst)} ms)`);
    parts.push(`its clients not served: ${during.failed}`);
  }
  parts.push(`memory ${memory} -> ${peak} MiB`);
  parts.push(`descriptors ${descriptors} -> ${Math.max(descriptors, during.most)}`);
  if (!dead()) {
    ask.kill(server.workers[1]);
    await server.line('gone');
    const died = await ask.until(dead, CALM);
    const figures = () => `${ask.memory(server.pid)} MiB, ${ask.descriptors(server.pid)} descriptors`;
    parts.push(`after the worker was killed ${died ? 'the master died' : figures()}`);
  }
  ask.row(`4 hostile worker: ${FLOODS[kind]}`, parts.join('; '), 1);
  await server.end();
}

async function survives(kind) {
  const server = ask.master(__filename);
  const port = +(await server.expect('listening'));
  server.say(kind);
  await server.expect('sent');
  for (let served = 0; served < ENOUGH; served++) {
    const client = new ask.Client(port);
    if ((await Promise.race([client.done, ask.sleep(TIMEOUT)])) === 'served') continue;
    const died = await ask.until(() => server.status !== null, TIMEOUT);
    const text = died ? await server.complaint() : 'does not serve';
    await server.end();
    return `${kind} (${text})`;
  }
  await server.end();
  return null;
}

async function questions() {
  for (const kind of Object.keys(FLOODS)) await flood(kind);
  const ends = [];
  for (const kind of NONSENSE) ends.push(await survives(kind));
  const fatal = ends.filter((end) => end !== null);
  ask.row(
    '4 hostile worker: one senseless message in valid JSON',
    `${fatal.length} of ${NONSENSE.length} ended the master: ${fatal.join(', ') || 'none'}`,
    NONSENSE.length,
  );
}

if (cluster.isWorker) ask.serve();
else if (process.argv[2] === 'master') master();
else ask.run(questions);
