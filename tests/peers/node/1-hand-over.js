// Question 1: does a client lose its accepted connection when the worker that it was given to has an
// accident during the hand-over?
//
// Two workers share a port: a good one, and one that has the accident at a given step with the first
// connection that it gets: `sent` (the master has sent it, the worker has not read), `read`, and
// `acked` (the descriptor is acknowledged, the connection is not accepted). Two clients connect, so
// that exactly one connection is given to it. Each client should be served; what else becomes of it
// is counted when nothing has changed for SETTLE ms, and then, when all clients have gone, the
// descriptors that the master has not closed. A second part kills workers at random moments under load, and
// excuses the clients that a worker's program has seen.
'use strict';

const cluster = require('cluster');
const fs = require('fs');
const os = require('os');
const path = require('path');
const ask = require('./ask');

const ROUNDS = 10;
const FATAL_ROUNDS = 4; // where each needs a new master
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
    if (word === 'hand-over') ask.fork(ask.RAW, ['hand-over', step, fault]);
    else ask.fork(__filename, [log]);
  });
}

const rounds = (fault) => (fault === 'garble' ? FATAL_ROUNDS : ROUNDS);

async function struck(master, fault) {
  const bad = master.workers.at(-1);
  if (fault === 'stop') return ask.until(() => ask.stat(bad.pid)?.state === 'T', ask.PATIENCE);
  if (fault === 'garble') return ask.until(() => master.status !== null, 5000);
  return master.line(fault === 'close' ? 'closed' : 'gone');
}

// The clients of one step and fault that were not served, and how many masters died.
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
    server.say(`hand-over ${step} ${fault}`);
    await server.expect('listening');
    clients.push(new ask.Client(server.port), new ask.Client(server.port));
    await struck(server, fault);
    if (server.status === null) continue;
    died++;
    await server.end();
    server = null;
  }
  await ask.settled(clients, SETTLE);
  const lost = () => clients.map(({ outcome }) => outcome).filter((word) => word !== 'served');
  let text = `${step}: ${ask.told(lost())}`;
  if (fault === 'stop') {
    server.workers.slice(1).forEach((worker) => ask.kill(worker));
    await ask.settled(clients, SETTLE);
    text += ` (when it was killed then: ${ask.told(lost())})`;
  }
  if (died) text += ` (the master died ${died} times)`;
  clients.forEach((client) => client.drop());
  if (server === null) return text;
  await ask.sleep(SETTLE);
  text += `, ${ask.descriptors(server.pid) - server.descriptors} descriptors kept by the master`;
  const told = server.lines.filter((line) => line === 'disconnected').length;
  if (fault === 'close') text += `, ${told} disconnect events`;
  await server.end();
  return text;
}

// Each client has an address of its own, by which it is found in the log.
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
    `of ${clients.length} clients not served although no program had them: ` +
      `${ask.told(ours.map(({ outcome }) => outcome))}; in a program's hands: ${excused}`,
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
      `1 hand-over: the worker ${name}; clients not served per step, ${rounds(fault)} being given to it`,
      steps.join('; '),
      rounds(fault) * STEPS.length,
    );
  }
  await underLoad();
}

if (cluster.isWorker) worker();
else if (process.argv[2] === 'master') master(process.argv.slice(3));
else ask.run(questions);
