//! As whom requests are sent: found out with the first one, and again where rights change.

use std::{sync::atomic::Ordering, time::Duration};

use tokio::time::Instant;
use tracing::info;

use super::{Call, Cluster, Error, Identity, IdentityChoice, Lane, NodeFacts, Outgoing, Reply, node};

/// How long the requests of [`Cluster::identify`] may take each.
pub(super) const IDENTIFY_LIMIT: Duration = Duration::from_secs(5);

impl Cluster {
    /// Reads the own Node and finds out, on the way, as whom to act.
    ///
    /// # Errors
    /// As [`Cluster::node`]; a 403 says what is missing.
    pub async fn identify(&self) -> Result<NodeFacts, Error> {
        let first = match self.0.choice {
            IdentityChoice::Direct => Identity::Direct,
            IdentityChoice::Auto | IdentityChoice::Node => Identity::Node,
        };
        let mut reply = self.get_node_as(first).await?;
        let mut why = String::new();
        if reply.code == 403 && self.0.choice == IdentityChoice::Auto {
            why = reply.status().message;
            let second = self.get_node_as(Identity::Direct).await?;
            if second.code == 403 {
                let mut error = self.refusal(Call::GetNode, &reply);
                if let Error::Forbidden { message, .. } = &mut error {
                    *message = format!("{message}; nor without impersonation: {}", second.status().message);
                }
                return Err(error);
            }
            reply = second;
        }
        let facts = node::read(self, &reply);
        // Whatever was said to the credentials while the server was overloaded or broken says nothing about rights.
        if reply.proves_authorization() {
            self.0.direct.store(reply.identity == Identity::Direct, Ordering::Relaxed);
            self.announce(reply.identity, &why);
        }
        facts
    }

    fn announce(&self, identity: Identity, why: &str) {
        if self.0.announced.swap(true, Ordering::Relaxed) {
            return;
        }
        let server = &self.0.server;
        match identity {
            Identity::Node => {
                info!(%server, "acting as system:node:{}: the API server binds every right to this node", self.0.node)
            }
            Identity::Direct if why.is_empty() => info!(%server, "acting with the credentials' own rights"),
            Identity::Direct => {
                info!(%server, why, "acting with the credentials' own rights: the API server does not allow acting as the own node");
            }
        }
    }

    async fn get_node_as(&self, identity: Identity) -> Result<Reply, Error> {
        let request = node::get_request(&self.0.node)?;
        self.once(Call::GetNode, Lane::Control, &request, identity, Instant::now() + IDENTIFY_LIMIT, IDENTIFY_LIMIT)
            .await
    }

    /// Sends a request and reads the whole answer, whatever it is. Where the identity is refused and was only a belief,
    /// asks once more in the other one, and goes on with that where the answer proves that it is allowed.
    pub(super) async fn exchange(
        &self,
        call: Call,
        lane: Lane,
        request: Outgoing,
        limit: Duration,
    ) -> Result<Reply, Error> {
        let until = Instant::now() + limit;
        let reply = self.once(call, lane, &request, self.identity(), until, limit).await?;
        let Some(other) = self.alternative(&reply) else { return Ok(reply) };
        let again = self.once(call, lane, &request, other, until, limit).await?;
        Ok(self.choose(reply, again))
    }

    /// As whom else to ask: directly where acting as the own node is refused, and as the own node where the credentials
    /// themselves are not allowed to (the grant may have changed to the other kind meanwhile).
    pub(super) fn alternative(&self, reply: &Reply) -> Option<Identity> {
        if self.0.choice != IdentityChoice::Auto || reply.code != 403 {
            return None;
        }
        let status = reply.status();
        match reply.identity {
            Identity::Node => status.is_impersonation_refused().then_some(Identity::Direct),
            Identity::Direct => status.cause("NamespaceTerminating").is_none().then_some(Identity::Node),
        }
    }

    /// The answer to go by, of one that refused the identity and the one in the other identity.
    pub(super) fn choose(&self, refused: Reply, again: Reply) -> Reply {
        if again.proves_authorization() {
            self.switch(again.identity, &refused);
            return again;
        }
        // A refusal of both is told as the first; what passes (flow control, a broken server) is asked again.
        let passes = again.code == 429 || again.code >= 500;
        if passes && again.identity == Identity::Direct { again } else { refused }
    }

    pub(super) fn switch(&self, to: Identity, refused: &Reply) {
        let direct = to == Identity::Direct;
        if self.0.direct.swap(direct, Ordering::Relaxed) != direct {
            self.0.announced.store(false, Ordering::Relaxed);
            self.announce(to, &refused.status().message);
        }
    }
}
