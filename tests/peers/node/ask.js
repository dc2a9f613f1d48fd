// Functions that the eight questions share: starting masters, simulating clients, reading figures
// from /proc, and printing rows of the table.
'use strict';

const cluster = require('cluster');
const fs = require('fs');
const net = require('net');
const path = require('path');
const readline = require('readline');
const { spawn } = require('child_process');

const TIMEOUT = 60000; // ms for events that must happen, on a busy machine
const HZ = 100; // the unit of the times in /proc/PID/stat, on every Linux
const started = []; // masters and workers, by pid and start time

const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

function stat(pid) {
  let text;
  try {
    text = fs.readFileSync(`/proc/${pid}/stat`, 'latin1');
  } catch {
    return null;
  }
  const fields = text.slice(text.lastIndexOf(')') + 2).split(' ');
  if ('ZX'.includes(fields[0])) return null;
  return { state: fields[0], cpu: (+fields[11] + +fields[12]) / HZ, start: fields[19] };
}

// Identifies a process by pid and start time, because a pid can be reused.
function known(pid) {
  const now = stat(pid);
  return { pid, start: now && now.start };
}

function alive(process) {
  const now = stat(process.pid);
  return now !== null && now.start === process.start;
}

function memory(pid, field = 'VmRSS') {
  const text = fs.readFileSync(`/proc/${pid}/status`, 'latin1');
  return Math.round(+new RegExp(`^${field}:\\s+(\\d+)`, 'm').exec(text)[1] / 1024);
}

function descriptors(pid) {
  return fs.readdirSync(`/proc/${pid}/fd`).length;
}

// Waits until the condition is true, for at most `ms`. Returns the condition's last value.
async function until(condition, ms) {
  const deadline = Date.now() + ms;
  for (;;) {
    const answer = condition();
    if (answer || Date.now() > deadline) return answer;
    await sleep(10);
  }
}

// A program under test. `lines` holds the lines that the program has printed. A line `worker PID`
// names one of its workers.
class Program {
  constructor(command, args, options = {}) {
    this.lines = [];
    this.stderr = '';
    this.workers = [];
    this.status = null;
    this.process = spawn(command, args, { stdio: 'pipe', ...options });
    this.pid = this.process.pid;
    this.self = known(this.pid);
    started.push(this.self);
    this.process.stdin.on('error', () => {});
    this.process.stderr.on('data', (data) => (this.stderr += data));
    this.ended = new Promise((resolve) => {
      this.process.on('exit', (code, signal) => resolve((this.status = signal || code)));
    });
    readline.createInterface({ input: this.process.stdout }).on('line', (line) => this.receive(line));
  }

  receive(line) {
    const [word, pid] = line.split(' ');
    if (word === 'worker') {
      this.workers.push(known(+pid));
      started.push(this.workers.at(-1));
    }
    this.lines.push(line);
  }

  say(line) {
    this.process.stdin.write(`${line}\n`);
  }

  // Takes the next line that starts with `word`. Returns the rest of the line, or null after `ms`.
  async line(word, ms = TIMEOUT) {
    const find = () => this.lines.findIndex((line) => line.split(' ')[0] === word);
    await until(() => find() >= 0 || (this.status !== null && this.process.stdout.destroyed), ms);
    const index = find();
    return index < 0 ? null : this.lines.splice(index, 1)[0].slice(word.length + 1);
  }

  async expect(word) {
    const rest = await this.line(word);
    if (rest === null) throw new Error(`no "${word}" from ${this.process.spawnargs}: ${this.stderr}`);
    return rest;
  }

  // Returns the reason that a program printed before it exited, which is the line that names an
  // error, or the first line.
  async complaint() {
    // Wait for the end of the output, because it may arrive after the `exit` event. Workers may
    // keep the pipe open, so limit the wait.
    await until(() => this.process.stderr.destroyed, 500);
    const lines = this.stderr.split('\n').map((line) => line.trim());
    const named = lines.find((line) => /^\w*Error.*:|Assertion failed/.test(line));
    const line = named || lines.find((line) => line) || 'nothing';
    return `\`${line.replace(/[^ -~]|`/g, '?').slice(0, 90)}\``;
  }

  async end() {
    for (const one of [this.self, ...this.workers]) kill(one);
    await until(() => this.status !== null, 5000);
  }
}

// Starts the same file as the master.
function master(file, args = [], options = {}) {
  return new Program(process.execPath, [...(options.flags || []), file, 'master', ...args], options);
}

function kill(process, signal = 'SIGKILL') {
  if (!alive(process)) return;
  try {
    globalThis.process.kill(process.pid, signal);
  } catch (error) {
    if (error.code !== 'ESRCH') throw error;
  }
}

// A client that sends a line and waits for the answer. `outcome` is served, reset, closed
// (end-of-file without an answer), refused, or hung while nothing has happened.
class Client {
  constructor(port, options = {}) {
    this.outcome = 'hung';
    this.socket = net.connect({ port, host: '127.0.0.1', ...options });
    this.done = new Promise((resolve) => {
      const over = (outcome) => {
        if (this.outcome === 'hung') this.outcome = outcome;
        // Reset the connection, because an orderly close would leave thousands of ports in
        // TIME_WAIT.
        this.socket.resetAndDestroy();
        resolve(this.outcome);
      };
      this.socket.on('connect', () => {
        this.connected = true;
        this.socket.write('hello\n');
      });
      this.socket.on('data', () => over('served'));
      this.socket.on('end', () => over('closed'));
      this.socket.on('error', ({ code }) => {
        over({ ECONNRESET: 'reset', EPIPE: 'reset', ECONNREFUSED: 'refused' }[code] || code);
      });
      this.drop = () => resolve(this.socket.destroy());
    });
  }
}

function count(words) {
  const counts = {};
  for (const word of words) counts[word] = (counts[word] || 0) + 1;
  return counts;
}

// Waits until no client's outcome has changed for `ms`.
async function settled(clients, ms) {
  const hung = () => clients.filter(({ outcome }) => outcome === 'hung').length;
  for (let before = NaN; before !== hung(); ) {
    before = hung();
    await sleep(ms);
  }
}

// Returns a summary such as "3 hung, 1 reset", or "none".
function summary(words) {
  const parts = Object.entries(count(words)).map(([word, number]) => `${number} ${word}`);
  return parts.join(', ') || 'none';
}

// Runs a server in a worker that answers each line.
function serve(options = {}, then = () => {}) {
  const server = net.createServer((socket) => {
    then(socket);
    socket.on('error', () => {});
    socket.on('data', () => socket.write('world\n'));
  });
  return server.listen({ host: '127.0.0.1', port: 0, ...options });
}

// Forks `file` with node or python3 in a master, and prints the worker's pid.
function fork(file, args = [], settings = {}) {
  const node = process.execPath;
  const python = file.endsWith('.py');
  // Start python without site packages, which takes half the time.
  cluster.setupPrimary({ exec: file, args, execArgv: python ? ['-IS'] : [], ...settings });
  // Node always starts workers with `process.execPath`, so replace it for this call.
  if (python) process.execPath = 'python3';
  try {
    const worker = cluster.fork();
    console.log(`worker ${worker.process.pid}`);
    return worker;
  } finally {
    process.execPath = node;
  }
}

// Calls `act` in a master with the words of each line on standard input.
function obey(act) {
  readline.createInterface({ input: process.stdin }).on('line', (line) => act(...line.split(' ')));
}

function row(question, happened, runs) {
  const plain = (text) => String(text).replaceAll('|', '\\|');
  console.log(JSON.stringify({ question: plain(question), happened: plain(happened), runs }));
}

// Runs a question, and kills everything that it started, even if it fails.
async function run(ask) {
  // Handle rejections here, because one of several parallel promises may reject before it is
  // awaited.
  process.on('unhandledRejection', (error) => {
    console.error(error);
    process.exitCode = 1;
  });
  try {
    await ask();
  } catch (error) {
    console.error(error);
    process.exitCode = 1;
  }
  // Kill masters before their workers, because a master might fork again. The list has this order.
  for (const one of started) kill(one);
  const gone = await until(() => !started.some(alive), 10000);
  process.exit(gone ? process.exitCode : 1);
}

module.exports = {
  Client,
  TIMEOUT,
  Program,
  RAW: path.join(__dirname, 'raw.py'),
  alive,
  count,
  descriptors,
  fork,
  kill,
  master,
  memory,
  obey,
  row,
  run,
  serve,
  settled,
  sleep,
  stat,
  summary,
  until,
};
