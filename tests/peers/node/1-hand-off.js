// Question 1: is an accepted connection lost when the worker fails during the hand-off?
//
// Two workers share a port. One works correctly, and the other fails at a given step of the first
// connection that is dispatched to it. The steps are `sent` (the master has sent the connection,
// and the worker has not read it), `read`, and `acked` (the worker has acknowledged the descriptor
// and not accepted the connection).
//
// Two clients connect, so that exactly one connection is dispatched to the failing worker. Each
// client should be served. Other outcomes are counted when nothing has changed for SETTLE ms. When
// all clients have closed, the descriptors that the master has not closed are counted.
//
// A second part kills workers at random moments under load. Clients whose connection the worker's
// application had already received are not counted.
'use strict';

const cluster = require('cluster');
const fs = require('fs');
const os = require('os');
const path = require('path');
const ask = require('./ask');

const ROUNDS = 10;
const FATAL_ROUNDS = 4; // if each round needs a new master
const STEPS = ['sent', 'read', 'acked'];
const FAULTS = {
  kill: 'gets SIGKILL',
  exit: 'exits',
  stop: 'gets SIGSTOP',
  close: 'closes its channel',
  garble: 'writes a garbled line',
};
const SETTLE = 1500;
const LOAD_MS = 4000;
const LOAD_CLIENTS = 16;

function worker() {
  const log = process.argv[2] && fs.openSync(process.argv[2], 'a');
  ask.serve({}, (socket) => log && fs.writeSync(log, `${socket.remoteAddress}\n`));
}

function master([log]) {
  cluster.on('listening', (worker, { port }) => console.log(`listening ${port}`));
  cluster.on('exit', () => console.log('gone'));
  cluster.on('disconnect', () => console.log('disconnected'));
  ask.fork(__filename, log ? [log] : []);
  ask.obey((word, step, fault) => {
    if (word === 'hand-off') ask.fork(ask.RAW, ['hand-off', step, fault]);
    else ask.fork(__filename, [log]);
  });
}

const rounds = (fault) => (fault === 'garble' ? FATAL_ROUNDS : ROUNDS);

async function failed(master, fault) {
  const bad = master.workers.at(-1);
  if (fault === 'stop') return ask.until(() => ask.stat(bad.pid)?.state === 'T', ask.TIMEOUT);
  if (fault === 'garble') return ask.until(() => master.status !== null, 5000);
  return master.line(fault === 'close' ? 'closed' : 'gone');
}

// Counts the clients of one step and fault that were not served, and the masters that exited.
async function cell(step, fault) {
  const clients = [];
  let server = null;
  let died = 0;
  for (let round = 0; round < rounds(fault); round++) {
    if (server === null) {
      server = ask.master(__filename);
      server.port = +(await server.expect('listening'));
      server.descriptors = ask.descriptors(server.pid);
    }
    server.say(`hand-off ${step} ${fault}`);
    await server.expect('listening');
    clients.push(new ask.Client(server.port), new ask.Client(server.port));
    await failed(server, fault);
    if (server.status === null) continue;
    died++;
    await server.end();
    server = null;
  }
  await ask.settled(clients, SETTLE);
  const lost = () => clients.map(({ outcome }) => outcome).filter((word) => word !== 'served');
  let text = `${step}: ${ask.summary(lost())}`;
  if (fault === 'stop') {
    server.workers.slice(1).forEach((worker) => ask.kill(worker));
    await ask.settled(clients, SETTLE);
    text += ` (when it was killed then: ${ask.summary(lost())})`;
  }
  if (died) text += ` (the master died ${died} times)`;
  clients.forEach((client) => client.drop());
  if (server === null) return text;
  await ask.sleep(SETTLE);
  text += `, ${ask.descriptors(server.pid) - server.descriptors} descriptors kept by the master`;
  const events = server.lines.filter((line) => line === 'disconnected').length;
  if (fault === 'close') text += `, ${events} disconnect events`;
  await server.end();
  return text;
}

// Returns a client's own address, which identifies the client in the log.
function addressOf(number) {
  return `127.${1 + (number >> 16)}.${(number >> 8) & 255}.${number & 255}`;
}

async function underLoad() {
  const log = path.join(os.tmpdir(), 'seen-by-a-program');
  fs.writeFileSync(log, '');
  const server = ask.master(__filename, [log]);
  const port = +(await server.expect('listening'));
  server.say('another');
  await server.expect('listening');

  const clients = [];
  const end = Date.now() + LOAD_MS;
  const load = Array.from({ length: LOAD_CLIENTS }, async () => {
    while (Date.now() < end) {
      const localAddress = addressOf(clients.length);
      const client = new ask.Client(port, { localAddress });
      client.address = localAddress;
      clients.push(client);
      await Promise.race([client.done, ask.sleep(SETTLE)]);
    }
  });
  let kills = 0;
  while (Date.now() < end) {
    ask.kill(server.workers[kills++]);
    await server.expect('gone');
    server.say('another');
    await server.expect('listening');
  }
  await Promise.all(load);
  await ask.settled(clients, SETTLE);
  const seen = new Set(fs.readFileSync(log, 'latin1').split('\n'));
  const lost = clients.filter(({ outcome }) => outcome !== 'served');
  const ours = lost.filter((client) => client.connected && !seen.has(client.address));
  const excused = lost.length - ours.length;
  ask.row(
    '1 SIGKILL at random moments under load',
    `of ${clients.length} clients, not served although no application had received them: ` +
      `${ask.summary(ours.map(({ outcome }) => outcome))}; received by an application: ${excused}`,
    `${kills} kills`,
  );
  clients.forEach((client) => client.drop());
  await server.end();
}

async function questions() {
  const faults = Object.keys(FAULTS).map((fault) =>
    Promise.all(STEPS.map((step) => cell(step, fault))),
  );
  for (const [index, [fault, name]] of Object.entries(FAULTS).entries()) {
    const steps = await faults[index];
    ask.row(
      `1 hand-off: the worker ${name}; clients not served per step, of ${rounds(fault)} dispatched to it`,
      steps.join('; '),
      rounds(fault) * STEPS.length,
    );
  }
  await underLoad();
}

if (cluster.isWorker) worker();
else if (process.argv[2] === 'master') master(process.argv.slice(3));
else ask.run(questions);
