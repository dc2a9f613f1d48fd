// Question 3: which workers outlive their master?
//
// A master with one worker of each kind exits in one of four ways. The workers that are alive 1 s
// and 5 s later are counted. Each worker opens its own listener (`exclusive`), so that no listener
// keeps the master's loop running. Looping workers have the lowest priority.
'use strict';

const cluster = require('cluster');
const os = require('os');
const ask = require('./ask');

const ROUNDS = 2;
const FOREIGN_ID = 54321; // a uid and gid without any process
const ROOT = process.getuid() === 0;
const KINDS = ['idle', 'busy', 'looping'].concat(ROOT ? ['idle, other uid', 'looping, other uid'] : []);
const ENDINGS = {
  kill: 'SIGKILL',
  throw: 'an uncaught exception',
  exit: 'process.exit()',
  main: 'the end of main',
};

function loop() {
  os.setPriority(19);
  for (;;);
}

function worker(kind) {
  const looping = kind.startsWith('looping');
  const server = ask.serve({ exclusive: true });
  // Keep the worker's loop running even without the channel.
  setInterval(() => {}, 1000);
  server.on('listening', () => process.send(server.address().port, looping ? loop : undefined));
}

function master([ending]) {
  for (const kind of KINDS) {
    const uid = kind.endsWith('uid') ? { uid: FOREIGN_ID, gid: FOREIGN_ID } : { uid: undefined, gid: undefined };
    const one = ask.fork(__filename, [kind], uid);
    one.once('message', (port) => console.log(`ready ${port} ${kind}`));
  }
  ask.obey(() => {
    if (ending === 'throw') throw new Error('on purpose');
    if (ending === 'exit') process.exit(0);
    for (const one of Object.values(cluster.workers)) {
      one.process.unref();
      one.process.channel.unref();
    }
    process.stdin.destroy();
  });
}

async function orphans(ending) {
  const server = ask.master(__filename, [ending]);
  const ports = {};
  for (const _ of KINDS) {
    const [port, ...kind] = (await server.expect('ready')).split(' ');
    ports[kind.join(' ')] = port;
  }
  const client = new ask.Client(+ports.busy);
  client.socket.removeAllListeners('data');
  await new Promise((resolve) => client.socket.on('data', resolve));

  if (ending === 'kill') ask.kill(server.self);
  else server.say('end');
  if (!(await ask.until(() => server.status !== null, ask.TIMEOUT))) return ['master', 'master'];
  const living = () => KINDS.filter((_, index) => ask.alive(server.workers[index]));
  await ask.sleep(1000);
  const early = living();
  await ask.sleep(4000);
  const late = living();
  client.drop();
  await server.end();
  return [early, late];
}

async function questions() {
  const rows = Object.keys(ENDINGS).map((ending) =>
    Promise.all(Array.from({ length: ROUNDS }, () => orphans(ending))),
  );
  for (const [index, ending] of Object.values(ENDINGS).entries()) {
    const rounds = await rows[index];
    const alive = (when) => ask.summary(rounds.flatMap((round) => round[when]));
    const text = `alive after 1 s: ${alive(0)}; after 5 s: ${alive(1)}`;
    ask.row(`3 orphans after ${ending} of the master`, text, ROUNDS * KINDS.length);
  }
  if (!ROOT) ask.row('3 orphans with another uid', 'skipped: needs root', 0);
}

if (cluster.isWorker) worker(process.argv[2]);
else if (process.argv[2] === 'master') master(process.argv.slice(3));
else ask.run(questions);
