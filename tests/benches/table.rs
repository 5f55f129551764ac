//! Plain tables of what was measured, and on what machine.

use std::time::Duration;

use jiff::Timestamp;

/// Several times of the same thing.
pub struct Sample(Vec<Duration>);

impl Sample {
    /// # Panics
    /// Without any.
    pub fn new(mut times: Vec<Duration>) -> Self {
        assert!(!times.is_empty(), "nothing was measured");
        times.sort();
        Self(times)
    }

    pub fn mean(&self) -> Duration {
        self.0.iter().sum::<Duration>().div_f64(self.0.len() as f64)
    }

    pub fn median(&self) -> Duration {
        self.part(0.5)
    }

    pub fn worst(&self) -> Duration {
        self.part(1.0)
    }

    /// The smallest time that this part of all does not exceed.
    pub fn part(&self, part: f64) -> Duration {
        let place = (part * self.0.len() as f64).ceil() as usize;
        self.0[place.clamp(1, self.0.len()) - 1]
    }
}

/// Begins a part of the table.
pub fn section(title: &str) {
    println!("\n{title}");
}

/// One figure, with what it is to be.
pub fn row(what: &str, value: &str, target: &str) {
    println!("{}", format!("  {what:<44} {value:>10}   {target}").trim_end());
}

pub fn ms(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1000.0)
}

/// Of a million bytes.
pub fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

/// When and where.
pub fn machine() {
    let cpus = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpus.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or(": unknown CPU");
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let date = Timestamp::now().strftime("%Y-%m-%d");
    println!("{date}, {cores} cores, {}; load {}", model.trim_start_matches([' ', '\t', ':']), load());
}

/// The load averages of the last 1, 5 and 15 minutes.
pub fn load() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').take(3).collect::<Vec<_>>().join(" ")
}
