//! Takes over the terminal as `affinity top` does, and panics. A test checks the state of the terminal afterwards.

use affinity_user::top::Screen;

fn main() -> anyhow::Result<()> {
    let _screen = Screen::open()?;
    panic!("on purpose");
}
