//! Finds the ids of users and groups in `/etc/passwd` and `/etc/group` (passwd(5), group(5)).

use std::fs;

const USERS: &str = "/etc/passwd";
const GROUPS: &str = "/etc/group";

/// The user and group of the workers. If a field is `None`, the workers keep the master's id.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Ids {
    pub(crate) uid: Option<u32>,
    pub(crate) gid: Option<u32>,
}

/// Finds a user and a group by name or number. Without a group, returns the user's group.
pub(crate) fn find(user: Option<&str>, group: Option<&str>) -> Result<Ids, String> {
    let mut ids = Ids::default();
    if let Some(group) = group {
        ids.gid = Some(match parse(group) {
            Some(gid) => gid,
            None => {
                let groups = read(GROUPS, "--group", group)?;
                let entry = entry(&groups, group).and_then(|entry| entry.id);
                entry.ok_or_else(|| format!("--group {group}: no such group in {GROUPS}"))?
            }
        });
    }
    if let Some(user) = user {
        let number = parse(user);
        let users = match (number, group) {
            // Both ids are already known, so no entry is needed.
            (Some(_), Some(_)) => String::new(),
            _ => read(USERS, "--user", user)?,
        };
        let entry = entry(&users, user);
        let uid = number.or(entry.as_ref().and_then(|entry| entry.id));
        let uid = uid.ok_or_else(|| format!("--user {user}: no such user in {USERS}"))?;
        ids.uid = Some(uid);
        let gid = ids.gid.or(entry.and_then(|entry| entry.group));
        ids.gid = Some(gid.ok_or_else(|| {
            format!("--user {user}: not in {USERS}, so its group is unknown; add --group")
        })?);
    }
    Ok(ids)
}

/// Returns the id if the text is a number. The highest number is not an id, but means "unchanged" in
/// system calls.
fn parse(text: &str) -> Option<u32> {
    let is_number = text.bytes().all(|byte| byte.is_ascii_digit());
    let id = text.parse().ok().filter(|_| is_number);
    id.filter(|id| *id != u32::MAX)
}

fn read(path: &str, option: &str, name: &str) -> Result<String, String> {
    let bytes = fs::read(path);
    let bytes = bytes.map_err(|error| format!("{option} {name}: cannot read {path}: {error}"))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// A line of `/etc/passwd` or `/etc/group`.
struct Entry {
    id: Option<u32>,
    /// The user's group. The number in this field of a group's line, if any, is not used.
    group: Option<u32>,
}

/// Returns the first line with this name or, if the name is a number, with this id.
fn entry(lines: &str, name: &str) -> Option<Entry> {
    lines.lines().find_map(|line| {
        let mut fields = line.split(':');
        let (own_name, _, id) = (fields.next()?, fields.next()?, fields.next()?);
        (own_name == name || id == name).then(|| Entry {
            id: id.parse().ok(),
            group: fields.next().and_then(|group| group.parse().ok()),
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entry_finds_a_user_by_name_and_by_number() {
        let users = "root:x:0:0:root:/root:/bin/sh\n\nweb:x:33:34::/var/www:/bin/false\n";
        for name in ["web", "33"] {
            let entry = entry(users, name).unwrap();
            assert_eq!((entry.id, entry.group), (Some(33), Some(34)));
        }
        assert!(entry(users, "we").is_none());
    }

    #[test]
    fn number_with_a_group_needs_no_entry() {
        let ids = find(Some("4000000"), Some("4000001")).unwrap();
        let (uid, gid) = (Some(4_000_000), Some(4_000_001));
        assert_eq!(ids, Ids { uid, gid });
        let error = find(Some("4000000"), None).unwrap_err();
        assert!(error.contains("add --group"), "{error}");
    }
}
