//! Makes system calls fail with a seccomp filter, on every processor that has such filters.

use nix::libc;

/// Condition on an argument of a system call: its lower 32 bits, combined with `mask`, are `value`.
pub struct Argument {
    /// Position of the argument, from 0.
    pub index: u32,
    pub mask: u32,
    pub value: u32,
}

/// The calls that change ids. On ARM and x86 with 32 bits, C libraries do not make the calls that take
/// ids of 16 bits.
#[cfg(not(any(target_arch = "arm", target_arch = "x86")))]
pub use libc::{
    SYS_setgroups as SETGROUPS, SYS_setresgid as SETRESGID, SYS_setresuid as SETRESUID,
};
#[cfg(any(target_arch = "arm", target_arch = "x86"))]
pub use libc::{
    SYS_setgroups32 as SETGROUPS, SYS_setresgid32 as SETRESGID, SYS_setresuid32 as SETRESUID,
};

/// Makes the listed system calls fail with `errno` from now on, in this thread and in all threads
/// and processes that it starts.
///
/// If `clone3` is refused, `clone` with `CLONE_PIDFD` is refused too. Otherwise a fallback to
/// `clone` could still return a process descriptor.
pub fn refuse_calls(calls: &[libc::c_long], errno: i32) {
    let load = step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, NUMBER);
    let mut program = vec![load];
    for (index, call) in calls.iter().enumerate() {
        // A match jumps over the other comparisons and over the step that allows the call.
        program.push(jump_if(number_of(*call), calls.len() - index, 0));
    }
    program.extend(outcomes(errno));
    apply(&mut program);
    if calls.contains(&libc::SYS_clone3) {
        let pidfd = libc::CLONE_PIDFD.unsigned_abs();
        let flags = Argument {
            index: 0,
            mask: pidfd,
            value: pidfd,
        };
        refuse_call_if(libc::SYS_clone, &flags, errno);
    }
}

/// Makes one system call fail with `errno` from now on if an argument matches.
pub fn refuse_call_if(call: libc::c_long, argument: &Argument, errno: i32) {
    let load = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    let lower_half = if cfg!(target_endian = "big") { 4 } else { 0 };
    let mut program = vec![
        step(load, NUMBER),
        jump_if(number_of(call), 0, 3),
        step(load, ARGUMENTS + 8 * argument.index + lower_half),
        step(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, argument.mask),
        jump_if(argument.value, 1, 0),
    ];
    program.extend(outcomes(errno));
    apply(&mut program);
}

/// Offset of the call's number in `struct seccomp_data` (see seccomp(2)).
const NUMBER: u32 = 0;
/// Offset of the arguments in `struct seccomp_data`. Each argument has 8 bytes.
const ARGUMENTS: u32 = 16;

fn number_of(call: libc::c_long) -> u32 {
    u32::try_from(call).unwrap()
}

fn step(code: u32, operand: u32) -> libc::sock_filter {
    libc::sock_filter {
        code: u16::try_from(code).unwrap(),
        jt: 0,
        jf: 0,
        k: operand,
    }
}

/// Returns a step that skips `yes` steps if the accumulator is `value`, and `no` steps otherwise.
fn jump_if(value: u32, yes: usize, no: u8) -> libc::sock_filter {
    libc::sock_filter {
        jt: u8::try_from(yes).unwrap(),
        jf: no,
        ..step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, value)
    }
}

/// Returns the two last steps: one allows the call, and the other refuses it.
fn outcomes(errno: i32) -> [libc::sock_filter; 2] {
    let end = libc::BPF_RET | libc::BPF_K;
    let refusal = libc::SECCOMP_RET_ERRNO | errno.unsigned_abs();
    [step(end, libc::SECCOMP_RET_ALLOW), step(end, refusal)]
}

fn apply(program: &mut [libc::sock_filter]) {
    nix::sys::prctl::set_no_new_privs().unwrap();
    let filter = libc::sock_fprog {
        len: program.len().try_into().unwrap(),
        filter: program.as_mut_ptr(),
    };
    #[allow(unsafe_code)]
    // SAFETY: `filter` and the program that it points to are valid during the call, and the kernel
    // copies them.
    let set = unsafe {
        libc::prctl(
            libc::PR_SET_SECCOMP,
            libc::SECCOMP_MODE_FILTER,
            std::ptr::from_ref(&filter),
        )
    };
    nix::Error::result(set).unwrap();
}
