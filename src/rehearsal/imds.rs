//! A metadata service for local use: IMDSv2 with its tokens enforced, and notices that come and go by a script or at
//! the caller's word.
//!
//! [`MockImds`] listens and serves; [`Control`] is the handle with which a test or a rehearsal changes what can be
//! read, makes it misbehave, and asks what was requested.

mod bodies;
mod script;
mod server;
mod world;

use std::{
    io,
    net::SocketAddr,
    sync::{Arc, atomic::Ordering},
};

use axum::serve::ListenerExt;
use tokio::{net::TcpListener, sync::mpsc};
use tokio_util::sync::CancellationToken;

pub use script::{ScriptKind, Scripted};
pub use world::{Change, Control, Ending, Fault, Happening, Readable};

/// The instance that the service pretends to run on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// `i-…`
    pub instance_id: String,
    pub instance_type: String,
    /// The Region is derived from it.
    pub zone: String,
    /// `spot`, `on-demand`, `scheduled` or `capacity-block`.
    pub life_cycle: String,
}

impl Default for Machine {
    fn default() -> Self {
        Self {
            instance_id: "i-0a1b2c3d4e5f60718".into(),
            instance_type: "m7g.2xlarge".into(),
            zone: "eu-central-1b".into(),
            life_cycle: "spot".into(),
        }
    }
}

impl Machine {
    /// `eu-central-1` for `eu-central-1b`, `us-west-2` for the local zone `us-west-2-lax-1a`; `None` for what is no
    /// zone.
    pub fn region(&self) -> Option<String> {
        let mut region = String::new();
        for part in self.zone.split('-') {
            let digits: String = part.chars().take_while(char::is_ascii_digit).collect();
            if !digits.is_empty() {
                return (!region.is_empty()).then(|| region + &digits);
            }
            region = region + part + "-";
        }
        None
    }
}

/// A metadata service that listens but does not answer before [`MockImds::serve`].
#[derive(Debug)]
pub struct MockImds {
    listener: TcpListener,
    address: SocketAddr,
    control: Control,
    script: Vec<Scripted>,
}

impl MockImds {
    /// Listens on `address`; port 0 takes a free one. Fails where the port is taken.
    pub async fn bind(address: SocketAddr, machine: Machine) -> io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        Ok(Self { listener, address, control: Control::new(&machine), script: Vec::new() })
    }

    /// Notices that come by themselves; their times count from the start of [`Self::serve`].
    #[must_use]
    pub fn script(mut self, script: Vec<Scripted>) -> Self {
        self.script = script;
        self
    }

    /// Where every change of what can be read is told. The receiver should keep up: the channel has no bound, and a
    /// script has as many changes as its author wrote.
    #[must_use]
    pub fn tell(self, to: mpsc::UnboundedSender<Happening>) -> Self {
        self.control.tell(to);
        self
    }

    /// `http://HOST:PORT`, as the option `--imds-url` takes it.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The address with the port that was really taken.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The handle on what it answers.
    pub fn control(&self) -> Control {
        self.control.clone()
    }

    /// Answers until `cancel`; then closes every connection.
    pub async fn serve(self, cancel: CancellationToken) -> io::Result<()> {
        let Self { listener, address: _, control, script } = self;
        let counted = control.clone();
        let listener = listener.tap_io(move |connection| {
            counted.shared.connections.fetch_add(1, Ordering::Relaxed);
            // A delayed small answer would be measured as slowness of whoever asked; without the option it still works.
            let _ = connection.set_nodelay(true);
        });
        let app = server::router(server::Service { control: control.clone(), cancel: cancel.clone() });
        let serving = axum::serve(listener, app).with_graceful_shutdown(cancel.clone().cancelled_owned());
        let playing = cancel.run_until_cancelled(script::play(&script, &control));
        let (served, _) = tokio::join!(async { serving.await }, playing);
        served
    }
}

/// Shared by the parts of this module: one lock, never held across an await.
type Shared = Arc<world::Shared>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_of_zones() {
        for (zone, region) in [
            ("eu-central-1b", Some("eu-central-1")),
            ("us-gov-west-1a", Some("us-gov-west-1")),
            ("us-west-2-lax-1a", Some("us-west-2")),
            ("us-east-1-wl1-bos-wlz-1", Some("us-east-1")),
            ("here", None),
            ("", None),
            ("1a", None),
        ] {
            let machine = Machine { zone: zone.into(), ..Machine::default() };
            assert_eq!(machine.region().as_deref(), region, "{zone}");
        }
    }
}
