//! Measures the memory of a worker.

use std::fs;

/// Returns a process's private memory in bytes. This is the size of its resident pages that no
/// other process maps (`Private_Clean` and `Private_Dirty` in `/proc/PID/smaps_rollup`, Linux
/// 4.14). Pages that a worker shares with its master, because the worker has executed no other
/// program, do not count. Pages of libraries that other processes also use do not count either.
///
/// If the resident memory is below `limit`, returns the resident memory instead. The kernel counts
/// private pages by walking the process's page tables. The walk takes about 30 ms per GiB (Linux
/// 6.18, 4 KiB pages), and the master does nothing else in this time. Reading `VmRSS` takes 20 µs.
///
/// If `smaps_rollup` cannot be read, returns the anonymous memory (`RssAnon`, Linux 4.5). If this
/// is also unknown, returns the resident memory. Both include pages that are shared with the
/// master. Reading `smaps_rollup` requires the permission to trace the process (`PTRACE_MODE_READ`
/// in ptrace(2)). A master that is not root does not have it for a worker of another user.
///
/// Returns `None` if the memory is unknown, for example outside Linux, without `/proc`, or with the
/// `/proc` of another PID namespace, in which `pid` is another process.
pub(super) fn own_memory(pid: u32, limit: u64) -> Option<u64> {
    let own = fs::read_link("/proc/self").ok()?;
    if own.as_os_str() != std::process::id().to_string().as_str() {
        return None;
    }
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let resident = bytes(&status, "VmRSS:")?;
    if resident < limit {
        return Some(resident);
    }
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok();
    let own = rollup.and_then(|rollup| private(&rollup));
    own.or_else(|| bytes(&status, "RssAnon:"))
        .or(Some(resident))
}

fn private(rollup: &str) -> Option<u64> {
    let clean = bytes(rollup, "Private_Clean:")?;
    let dirty = bytes(rollup, "Private_Dirty:")?;
    Some(clean.saturating_add(dirty))
}

/// Returns the value of a line such as `VmRSS:   100 kB`, in bytes.
fn bytes(text: &str, name: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = value.trim().strip_suffix(" kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn private_memory_is_the_sum_of_clean_and_dirty_pages() {
        let rollup = "5581c4a5e000-7ffd35bb6000 ---p 00000000 00:00 0          [rollup]\n\
                      Rss:              524288 kB\n\
                      Shared_Clean:       2048 kB\n\
                      Shared_Dirty:     512000 kB\n\
                      Private_Clean:         4 kB\n\
                      Private_Dirty:        12 kB\n";
        assert_eq!(private(rollup), Some(16 << 10));
        // The file of a process that has exited is empty.
        assert_eq!(private(""), None);
    }

    #[test]
    fn memory_of_a_missing_process_is_unknown() {
        assert_eq!(own_memory(u32::MAX, 0), None);
    }

    #[cfg(any(target_os = "linux", target_os = "android"))]
    #[test]
    fn own_memory_is_at_most_the_resident_memory() {
        let pid = std::process::id();
        let resident = own_memory(pid, u64::MAX).unwrap();
        let own = own_memory(pid, 0).unwrap();
        assert!(
            own > 0 && own <= resident.saturating_mul(2),
            "{own} of {resident}"
        );
    }
}
