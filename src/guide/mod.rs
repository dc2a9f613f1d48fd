#![doc = include_str!("index.md")]
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
