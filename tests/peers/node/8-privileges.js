// Question 8: do workers drop privileges, and what happens to a process with a forged identity?
//
// The master has the supplementary groups GROUPS. Workers report their ids from /proc/self/status.
// A master without privileges requests another user.
//
// Then a program that uses `cluster` is started without a master, but with the environment
// variables that identify a worker. The row shows the program's output and exit code, or that the
// program hangs.
'use strict';

const cluster = require('cluster');
const fs = require('fs');
const net = require('net');
const os = require('os');
const path = require('path');
const ask = require('./ask');

const GROUPS = [0, 4, 27];
const FOREIGN_ID = 54321; // a uid and gid without any process
const TIMEOUT = 5000;
const HOST = `
import os, sys
os.setgroups([${GROUPS}])
os.execvp(sys.argv[1], sys.argv[1:])
`;

function worker() {
  const status = fs.readFileSync('/proc/self/status', 'latin1');
  const ids = (name) => new RegExp(`^${name}:[ \\t]*(.*)$`, 'm').exec(status)[1].trim();
  const text = `uid ${ids('Uid')}, gid ${ids('Gid')}, groups ${ids('Groups') || 'none'}`;
  process.send(text.replaceAll('\t', ' '), () => process.exit());
}

function master([settings]) {
  try {
    const worker = ask.fork(__filename, [], JSON.parse(settings));
    worker.on('message', (text) => console.log(`is ${text}`));
    worker.on('error', ({ code }) => console.log(`is not forked: error event ${code}`));
    worker.on('exit', (code) => console.log(`is gone, ${code}`));
  } catch ({ name, code, message }) {
    console.log(`is not forked: threw ${code || name}: ${message}`);
  }
}

// Runs an ordinary application, which does not know that it has no master.
function foreign() {
  net.createServer().listen(0, () => console.log(`is listening, isWorker ${cluster.isWorker}`));
}

async function dropped() {
  for (const settings of [{ uid: FOREIGN_ID, gid: FOREIGN_ID }, { uid: FOREIGN_ID }, { gid: FOREIGN_ID }]) {
    const command = [process.execPath, __filename, 'master', JSON.stringify(settings)];
    const server = new ask.Program('python3', ['-c', HOST, ...command]);
    const text = await server.expect('is');
    const names = Object.keys(settings).join(' and ');
    ask.row(`8 settings ${names} (${FOREIGN_ID}), as root with groups ${GROUPS}`, text, 1);
    await server.end();
  }
  const settings = JSON.stringify({ uid: 0, gid: 0 });
  const server = ask.master(__filename, [settings], { uid: FOREIGN_ID, gid: FOREIGN_ID });
  const text = await server.line('is', TIMEOUT);
  const complaint = `the master died: ${await server.complaint()}`;
  ask.row('8 settings uid and gid (0), without privileges', text ?? complaint, 1);
  await server.end();
}

async function forged() {
  const file = fs.openSync(path.join(os.tmpdir(), 'no-channel'), 'w+');
  const cases = [
    ['alone', {}, 'ignore'],
    ['and a NODE_CHANNEL_FD that is not open', { NODE_CHANNEL_FD: '99' }, 'ignore'],
    ['and a NODE_CHANNEL_FD that is no number', { NODE_CHANNEL_FD: 'nonsense' }, 'ignore'],
    ['and a NODE_CHANNEL_FD that is a file', { NODE_CHANNEL_FD: '3' }, file],
    ['and a NODE_CHANNEL_FD that is a pipe to a foreign process', { NODE_CHANNEL_FD: '3' }, 'pipe'],
  ];
  for (const [name, variables, channel] of cases) {
    const env = { ...process.env, NODE_UNIQUE_ID: '1', ...variables };
    const stdio = ['pipe', 'pipe', 'pipe', channel];
    const one = new ask.Program(process.execPath, [__filename, 'foreign'], { env, stdio });
    const status = await Promise.race([one.ended, ask.sleep(TIMEOUT)]);
    const text = status === undefined ? `not finished within ${TIMEOUT / 1000} s` : `exit ${status}`;
    const said = one.lines[0] || (await one.complaint());
    ask.row(`8 a foreign process with NODE_UNIQUE_ID ${name}`, `${text}; it prints ${said}`, 1);
    await one.end();
  }
}

async function questions() {
  if (process.getuid() === 0) await dropped();
  else ask.row('8 settings uid and gid', 'skipped: needs root', 0);
  await forged();
}

if (process.argv[2] === 'foreign') foreign();
else if (cluster.isWorker) worker();
else if (process.argv[2] === 'master') master(process.argv.slice(3));
else ask.run(questions);
