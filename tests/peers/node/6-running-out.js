// Question 6: what happens when descriptors or processes run out, and afterwards?
//
// RLIMIT_NOFILE of the running master, or of its worker, is lowered so that the process cannot open
// one more descriptor. CLIENTS clients connect, and CPU time is measured for MEASURE ms. Then the
// limit is lifted, the same clients are checked again, and CLIENTS new ones connect.
//
// `cluster.fork()` is called at that limit, and at RLIMIT_NPROC as a user without other processes.
// The master handles the `error` event of its workers.
'use strict';

const cluster = require('cluster');
const fs = require('fs');
const { execFileSync } = require('child_process');
const ask = require('./ask');

const CLIENTS = 20;
const MEASURE = 2000;
const SETTLE = 1000;
const TIMEOUT = 10000;
const FOREIGN_ID = 54321; // a uid and gid without any process

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

// Sets a limit as the process's own user, because root without capabilities may not change another
// user's limits.
function limit(pid, resource, value, user = {}) {
  execFileSync('prlimit', ['--pid', pid, `--${resource}=${value}:`], user);
}

// Returns the lowest free descriptor. As the limit, this number leaves no descriptor free.
function exhausted(pid) {
  const open = new Set(fs.readdirSync(`/proc/${pid}/fd`).map(Number));
  let number = 0;
  while (open.has(number)) number++;
  return number;
}

const outcomes = (clients) => ask.summary(clients.map(({ outcome }) => outcome));

async function clientsOf(port) {
  const clients = Array.from({ length: CLIENTS }, () => new ask.Client(port));
  await Promise.race([Promise.all(clients.map(({ done }) => done)), ask.sleep(MEASURE)]);
  return clients;
}

async function descriptors(who) {
  const server = ask.master(__filename);
  const port = +(await server.expect('listening'));
  await new ask.Client(port).done; // opens everything that the first connection needs
  const { pid } = who === 'master' ? server : server.workers[0];
  const open = exhausted(pid);
  limit(pid, 'nofile', open);
  const start = Date.now();
  const cpu = ask.stat(pid).cpu;
  const clients = await clientsOf(port);
  await ask.sleep(start + MEASURE - Date.now());
  const spent = (ask.stat(pid)?.cpu ?? NaN) - cpu;
  const during = outcomes(clients);
  if (server.status === null && ask.stat(pid)) limit(pid, 'nofile', 1024);
  await ask.sleep(SETTLE);
  const later = outcomes(clients);
  const fresh = server.status === null ? outcomes(await clientsOf(port)) : 'none';
  ask.row(
    `6 the ${who} has no descriptor left (EMFILE)`,
    `${CLIENTS} clients: ${during}, CPU ${spent.toFixed(2)} s in ${MEASURE / 1000} s; limit lifted: the ` +
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
  const first = await server.line('fork', TIMEOUT);
  const died = await ask.until(() => server.status !== null, SETTLE);
  let text = first === null ? `no event, no error within ${TIMEOUT / 1000} s` : first;
  if (died) {
    text += `; the master died: ${await server.complaint()}`;
  } else {
    limit(server.pid, resource, 1024, user);
    server.say('fork');
    const more = [];
    // Skip the remaining lines of the first attempt, which come first.
    while (more.at(-1) !== 'online') {
      const next = await server.line('fork', TIMEOUT);
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
  await forking('nproc', { uid: FOREIGN_ID, gid: FOREIGN_ID }, () => 1);
}

if (cluster.isWorker) ask.serve();
else if (process.argv[2] === 'master') master();
else ask.run(questions);
