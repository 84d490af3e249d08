//! Captures the frames of a device: `tcpdump` writes them, [`read_pcap`] reads them.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

use super::{eventually, netns::Namespace};

/// Longer than the kernel takes to deliver the last frames. No event tells that they have been captured.
const LAST_FRAMES: Duration = Duration::from_millis(200);

/// Longer than any frame of a lab: the kernel reserves that much for each.
const FRAME_MAX: &str = "9216";
/// Room for a few thousand frames.
const BUFFER_KIB: &str = "32768";

/// Which frames of a device to capture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Those it receives: native XDP has seen them, TC has not.
    In,
    /// Those it sends: TC has seen them.
    Out,
}

/// A running capture. Dropping it stops it.
#[derive(Debug)]
pub struct Capture {
    tcpdump: Child,
    file: PathBuf,
    /// Collects its messages: at its end it prints how many frames it has missed.
    words: Option<JoinHandle<String>>,
}

impl Capture {
    /// Starts to capture in `file`, and returns when frames are being captured.
    ///
    /// # Errors
    /// When tcpdump is missing, or fails.
    pub fn start(namespace: &Namespace, device: &str, direction: Direction, file: &Path) -> Result<Self> {
        let direction = match direction {
            Direction::In => "in",
            Direction::Out => "out",
        };
        let mut tcpdump = namespace
            .command("tcpdump")
            .args(["-n", "--immediate-mode", "-U", "-Z", "root", "-s", FRAME_MAX, "-B", BUFFER_KIB])
            .args(["-i", device, "-Q", direction, "-w"])
            .arg(file)
            .stderr(Stdio::piped())
            .spawn()
            .context("start tcpdump")?;
        let mut lines = BufReader::new(tcpdump.stderr.take().context("no standard error")?).lines();
        let mut said = Vec::new();
        loop {
            match lines.next() {
                Some(Ok(line)) if line.contains("listening on") => break,
                Some(Ok(line)) => said.push(line),
                Some(Err(_)) | None => {
                    tcpdump.wait()?;
                    bail!("tcpdump: {}", said.join("; "));
                }
            }
        }
        let words = thread::spawn(move || lines.map_while(Result::ok).collect::<Vec<_>>().join("; "));
        Ok(Self { tcpdump, file: file.to_owned(), words: Some(words) })
    }

    /// Waits until a captured frame satisfies this condition.
    ///
    /// # Errors
    /// When none comes within the limit.
    pub fn until(&self, what: &str, limit: Duration, holds: impl Fn(&[u8]) -> bool) -> Result<()> {
        eventually(what, limit, || {
            // The last frame may not have been written completely.
            let frames = read_pcap(&fs::read(&self.file)?).unwrap_or_default();
            Ok(frames.iter().any(|frame| holds(frame)))
        })
    }

    /// Stops, and returns the frames.
    ///
    /// # Errors
    /// When frames are missing, or the file is not a capture.
    pub fn stop(mut self) -> Result<Vec<Vec<u8>>> {
        thread::sleep(LAST_FRAMES);
        self.end()?;
        let words = self.words.take().and_then(|words| words.join().ok()).unwrap_or_default();
        ensure!(words.contains("; 0 packets dropped by kernel"), "tcpdump: {words}");
        read_pcap(&fs::read(&self.file).with_context(|| self.file.display().to_string())?)
    }

    fn end(&mut self) -> Result<()> {
        if self.tcpdump.try_wait()?.is_none() {
            kill_process(Pid::from_child(&self.tcpdump), Signal::INT)?;
            self.tcpdump.wait()?;
        }
        Ok(())
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        let _ = self.end();
    }
}

/// The frames of a capture file as this machine writes it: classic pcap, native byte order, Ethernet.
///
/// # Errors
/// When it is another format, or ends in the middle of a frame.
pub fn read_pcap(bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
    const MAGIC_MICROSECONDS: u32 = 0xa1b2_c3d4;
    const HEADER_LENGTH: usize = 24;
    const RECORD_HEADER_LENGTH: usize = 16;
    let word = |at: usize| -> Result<u32> {
        let word = bytes.get(at..at + 4).context("a capture that ends early")?;
        Ok(u32::from_ne_bytes(word.try_into()?))
    };
    ensure!(word(0)? == MAGIC_MICROSECONDS && word(20)? == 1, "not a capture of Ethernet frames");
    let mut frames = Vec::new();
    let mut at = HEADER_LENGTH;
    while at < bytes.len() {
        let length = usize::try_from(word(at + 8)?)?;
        let start = at + RECORD_HEADER_LENGTH;
        frames.push(bytes.get(start..start + length).context("a capture that ends early")?.to_vec());
        at = start + length;
    }
    Ok(frames)
}
