// Question 5: does the cluster affect only its own descriptors and signals?
//
// A host process starts the master with a file open at descriptors 7 and 40, without close-on-exec,
// and with SIGCHLD ignored. /proc/PID/fd shows whether the file is open in a worker. The worker is
// a Node worker in one case and another program in the other. The second row shows whether a
// worker's exit code still arrives.
'use strict';

const cluster = require('cluster');
const fs = require('fs');
const os = require('os');
const path = require('path');
const ask = require('./ask');

const NUMBERS = [7, 40];
const CODE = 23;
const HOST = `
import os, signal, sys
file = os.open(sys.argv[1], os.O_RDONLY)
for number in (${NUMBERS}):
    os.dup2(file, number)
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
os.execvp(sys.argv[2], sys.argv[2:])
`;

function worker() {
  process.on('message', () => process.exit(CODE));
}

function master() {
  const one = ask.fork(__filename);
  const other = ask.fork(ask.RAW, ['wait']);
  one.on('exit', (code, signal) => console.log(`exit ${signal || code}`));
  for (const each of [one, other]) each.on('online', () => console.log('online'));
  ask.obey(() => one.send('exit'));
}

function links(pid) {
  const folder = `/proc/${pid}/fd`;
  return fs.readdirSync(folder).map((name) => [+name, fs.readlinkSync(`${folder}/${name}`)]);
}

async function questions() {
  const file = path.join(os.tmpdir(), 'the-hosts-own');
  fs.writeFileSync(file, '');
  const command = ['-c', HOST, file, process.execPath, __filename, 'master'];
  const server = new ask.Program('python3', command);
  await server.expect('online');
  await server.expect('online');
  const numbers = (pid) => {
    const found = links(pid).filter(([, target]) => target === file);
    return found.map(([number]) => number).join(' and ') || 'nowhere';
  };
  const [node, other] = server.workers;
  const open = links(other.pid).map(([number]) => number);
  ask.row(
    `5 a host's descriptor, inheritable at ${NUMBERS.join(' and ')}`,
    `open in the master at ${numbers(server.pid)}, in a worker at ${numbers(node.pid)}, in a worker ` +
      `that is not Node at ${numbers(other.pid)} (all its descriptors: ${open.join(', ')})`,
    2,
  );
  server.say('exit');
  const status = await server.line('exit', 10000);
  const event = status === null ? 'no exit event within 10 s' : `exit event with code ${status}`;
  ask.row('5 SIGCHLD ignored by the host', `a worker that exits with ${CODE}: ${event}`, 1);
  await server.end();
}

if (cluster.isWorker) worker();
else if (process.argv[2] === 'master') master();
else ask.run(questions);
