// Question 6: what happens when descriptors or processes run out, and afterwards?
//
// RLIMIT_NOFILE of the running master, or of its worker, is lowered so that not one more descriptor
// can be had; CLIENTS clients connect, and CPU time is measured for MEASURE ms. Then the limit is
// lifted, the same clients are looked at again, and as many new ones connect. `cluster.fork()` is
// tried at that limit, and at RLIMIT_NPROC with a user who has no other process. The master handles
// the `error` event of its workers.
'use strict';

const cluster = require('cluster');
const fs = require('fs');
const { execFileSync } = require('child_process');
const ask = require('./ask');

const CLIENTS = 20;
const MEASURE = 2000;
const SETTLE = 1000;
const PATIENCE = 10000;
const STRANGER = 54321; // a uid that nobody has

function tryFork() {
  try {
    const worker = ask.fork(__filename);
    worker.on('error', ({ code }) => console.log(`fork error event ${code}`));
    worker.on('online', () => console.log('fork online'));
    worker.on('exit', (code, signal) => console.log(`fork exit event ${signal || code}`));
  } catch ({ name, code, message }) {
    console.log(`fork threw ${code || name}: ${message}`);
  }
}

function master() {
  cluster.on('listening', (worker, { port }) => console.log(`listening ${port}`));
  ask.fork(__filename);
  ask.obey(tryFork);
}

// Where root has lost its capabilities, only the same user may change it.
function limit(pid, resource, value, user = {}) {
  execFileSync('prlimit', ['--pid', pid, `--${resource}=${value}:`], user);
}

// No descriptor below this number is free.
function exhausted(pid) {
  const open = new Set(fs.readdirSync(`/proc/${pid}/fd`).map(Number));
  let number = 0;
  while (open.has(number)) number++;
  return number;
}

const outcomes = (clients) => ask.told(clients.map(({ outcome }) => outcome));

async function clientsOf(port) {
  const clients = Array.from({ length: CLIENTS }, () => new ask.Client(port));
  await Promise.race([Promise.all(clients.map(({ done }) => done)), ask.sleep(MEASURE)]);
  return clients;
}

async function descriptors(who) {
  const server = ask.master(__filename);
  const port = +(await server.expect('listening'));
  await new ask.Client(port).done; // everything that is needed for one is there
  const { pid } = who === 'master' ? server : server.workers[0];
  const open = exhausted(pid);
  limit(pid, 'nofile', open);
  const start = Date.now();
  const cpu = ask.stat(pid).cpu;
  const clients = await clientsOf(port);
  await ask.sleep(start + MEASURE - Date.now());
  const spent = (ask.stat(pid)?.cpu ?? NaN) - cpu;
  const then = outcomes(clients);
  if (server.status === null && ask.stat(pid)) limit(pid, 'nofile', 1024);
  await ask.sleep(SETTLE);
  const later = outcomes(clients);
  const fresh = server.status === null ? outcomes(await clientsOf(port)) : 'none';
  ask.row(
    `6 the ${who} has no descriptor left (EMFILE)`,
    `${CLIENTS} clients: ${then}, CPU ${spent.toFixed(2)} s in ${MEASURE / 1000} s; limit lifted: the ` +
      `same ${later}, new ones ${fresh}; master ${server.status === null ? 'lives' : 'died'}`,
    1,
  );
  clients.forEach((client) => client.drop());
  await server.end();
}

async function forking(resource, user, value) {
  const server = ask.master(__filename, [], user);
  await server.expect('listening');
  limit(server.pid, resource, value(server.pid), user);
  server.say('fork');
  const first = await server.line('fork', PATIENCE);
  const died = await ask.until(() => server.status !== null, SETTLE);
  let text = first === null ? `no event, no error within ${PATIENCE / 1000} s` : first;
  if (died) {
    text += `; the master died: ${await server.complaint()}`;
  } else {
    limit(server.pid, resource, 1024, user);
    server.say('fork');
    const more = [];
    // What else the first attempt had to say comes before.
    while (more.at(-1) !== 'online') {
      const next = await server.line('fork', PATIENCE);
      more.push(next);
      if (next === null) break;
    }
    text += `; the master lives; limit lifted: ${more.map((each) => each ?? 'nothing').join(', ')}`;
  }
  ask.row(`6 cluster.fork() at RLIMIT_${resource.toUpperCase()}`, text, 1);
  await server.end();
}

async function questions() {
  await descriptors('master');
  await descriptors('worker');
  await forking('nofile', {}, exhausted);
  if (process.getuid() !== 0) return ask.row('6 RLIMIT_NPROC', 'skipped: needs root', 0);
  await forking('nproc', { uid: STRANGER, gid: STRANGER }, () => 1);
}

if (cluster.isWorker) ask.serve();
else if (process.argv[2] === 'master') master();
else ask.run(questions);
