//! [quick_start]: crate::guide::quick_start
//! [how_it_works]: crate::guide::how_it_works
//! [writing_workers]: crate::guide::writing_workers
//! [servers]: crate::guide::servers
//! [pools]: crate::guide::pools
//! [deploying]: crate::guide::deploying
//! [devices]: crate::guide::devices
//! [operating]: crate::guide::operating
//! [from_node]: crate::guide::from_node
//! [guarantees]: crate::guide::guarantees
//! [costs]: crate::guide::costs
//! [limits]: crate::guide::limits
//! [design]: crate::guide::design
//! [glossary]: crate::guide::glossary
//! [keep_alive]: crate::guide::writing_workers#connections-that-stay-open
//! [slow_clients]: crate::guide::writing_workers#slow-and-silent-clients
//! [tls]: crate::guide::writing_workers#tls
//! [long_connections]: crate::guide::writing_workers#websockets-and-other-long-connections
//! [sticky]: crate::guide::writing_workers#sticky-sessions
//! [threads]: crate::guide::writing_workers#threads
//! [async_runtimes]: crate::guide::servers#async-runtimes
//! [policies]: crate::guide::how_it_works#policies
//! [sizing]: crate::guide::operating#how-many-workers
//! [descriptors]: crate::guide::operating#descriptors
//! [pool_clocks]: crate::guide::pools#every-clock-and-default
//! [signals]: crate::guide::operating#signals
//! [reload]: crate::guide::pools#reload
//! [upgrade]: crate::guide::pools#upgrade
//! [canary]: crate::guide::pools#canary
//! [killed_worker]: crate::guide::guarantees#what-a-killed-worker-costs
//! [stuck]: crate::guide::operating#slow-or-stuck
//! [logs]: crate::guide::operating#logs
//! [status]: crate::guide::operating#status-and-metrics
//! [outside]: crate::guide::operating#metrics-from-outside
//! [containers]: crate::guide::deploying#containers
//! [kubernetes]: crate::guide::deploying#kubernetes
//! [users]: crate::guide::deploying#users-and-groups
//! [ports]: crate::guide::deploying#privileged-ports
//! [device_packages]: crate::guide::devices
//! [watchdog]: crate::guide::devices#hardware-watchdog
//! [client_address]: crate::guide::deploying#the-proxy-protocol
//! [security]: crate::guide::limits#security
//! [pm2]: crate::guide::from_node#from-pm2
//! [others]: crate::guide::from_node#from-gunicorn-puma-and-nginx
//!
#![doc = include_str!("index.md")]
// The rendered documentation uses the first definition of each link. The definitions above therefore
// replace the relative paths at the end of index.md, which work on the repository's page.

// The modules exist only for the documentation: `lib.rs` compiles them for rustdoc alone.

// Pictures: a chapter shows `![…][name.svg]`, and its end defines `name.svg` as a relative path, which
// works on the repository's page. rustdoc copies no image files. In the rendered documentation,
// `pictures/inline.md` therefore precedes the chapter and defines each picture as a `data:` URL.
// Markdown uses the first definition of a label. `tests/pictures/render` writes all these files.

#[doc = include_str!("quick_start.md")]
pub mod quick_start {}

#[doc = include_str!("pictures/inline.md")]
#[doc = include_str!("how_it_works.md")]
pub mod how_it_works {}

#[doc = include_str!("writing_workers.md")]
pub mod writing_workers {}

#[doc = include_str!("servers.md")]
pub mod servers {}

#[doc = include_str!("pictures/inline.md")]
#[doc = include_str!("pools.md")]
pub mod pools {}

#[doc = include_str!("deploying.md")]
pub mod deploying {}

#[doc = include_str!("devices.md")]
pub mod devices {}

#[doc = include_str!("operating.md")]
pub mod operating {}

#[doc = include_str!("from_node.md")]
pub mod from_node {}

#[doc = include_str!("guarantees.md")]
pub mod guarantees {}

#[doc = include_str!("pictures/inline.md")]
#[doc = include_str!("costs.md")]
pub mod costs {}

#[doc = include_str!("limits.md")]
pub mod limits {}

#[doc = include_str!("design.md")]
pub mod design {}

#[doc = include_str!("glossary.md")]
pub mod glossary {}
