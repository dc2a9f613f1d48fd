//! Parts of the kernel's interface that `libc` lacks for Android.

use std::os::fd::RawFd;

/// Forbids changes of a socket's filters (socket(7)).
pub(super) const SO_LOCK_FILTER: libc::c_int = 44;

// The parts of a BPF instruction's code (linux/bpf_common.h).
pub(super) const BPF_LD: u32 = 0x00;
pub(super) const BPF_ALU: u32 = 0x04;
pub(super) const BPF_JMP: u32 = 0x05;
pub(super) const BPF_RET: u32 = 0x06;
pub(super) const BPF_W: u32 = 0x00;
pub(super) const BPF_B: u32 = 0x10;
pub(super) const BPF_ABS: u32 = 0x20;
pub(super) const BPF_ADD: u32 = 0x00;
pub(super) const BPF_AND: u32 = 0x50;
pub(super) const BPF_MOD: u32 = 0x90;
pub(super) const BPF_JEQ: u32 = 0x10;
pub(super) const BPF_JGE: u32 = 0x30;
pub(super) const BPF_K: u32 = 0x00;
/// The accumulator as the result (linux/filter.h).
pub(super) const BPF_A: u32 = 0x10;

/// The address that loads a random number (linux/filter.h).
pub(super) const SKF_AD_RANDOM: i32 = -0x1000 + 56;

/// The beginning of `struct tcp_info` (linux/tcp.h). The kernel writes as much as there is space
/// for.
#[repr(C)]
pub(super) struct TcpInfo {
    state_and_options: [u8; 8],
    timeouts_and_segment_sizes: [u32; 4],
    pub(super) unacked: u32,
}

/// Replaces the descriptor `to` by a copy of `from` that is closed on exec (dup(2)). Async-signal-safe.
///
/// # Safety
///
/// The caller owns the descriptor `to`.
pub(super) unsafe fn dup3(from: RawFd, to: RawFd) -> libc::c_int {
    // SAFETY: the caller owns the descriptor that the call replaces.
    let result = unsafe { libc::syscall(libc::SYS_dup3, from, to, libc::O_CLOEXEC) };
    // A descriptor number or -1 always fits.
    libc::c_int::try_from(result).unwrap_or(-1)
}
