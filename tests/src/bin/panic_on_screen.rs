//! Takes over the terminal as `affinity top` does, and panics. A test looks at what is left of the terminal.

use affinity_user::top::Screen;

fn main() -> anyhow::Result<()> {
    let _screen = Screen::open()?;
    panic!("on purpose");
}
