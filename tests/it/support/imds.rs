//! amazon-ec2-metadata-mock, the stand-in for IMDS that the field uses.

use std::{net::SocketAddr, time::Duration};

use jiff::Timestamp;
use serde_json::json;

use super::{
    controlplane::asset,
    eventually,
    fleet::TestNode,
    keeper::{free_port, keeper},
    process::{Process, http},
};

/// A running mock that demands IMDSv2 tokens. Dropped, it ends.
pub struct MetadataMock {
    pub process: Process,
    pub address: SocketAddr,
    /// `http://127.0.0.1:PORT`
    pub url: String,
    /// When the notice can be read from: the moment of the start plus the delay.
    pub readable: Timestamp,
}

impl MetadataMock {
    /// A spot interruption (and with it a rebalance recommendation, which this mock always gives too), readable after
    /// `delay`, which is counted in whole seconds; the machine ends `left` after that.
    ///
    /// The time is fixed. Left to itself the mock would answer "two minutes from now" each time it is asked.
    pub async fn spot(node: &TestNode, delay: Duration, left: Duration) -> Self {
        let time = (Timestamp::now() + delay + left).strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        Self::start(node, delay, &["spot", "--action", "terminate", "--time", &time]).await
    }

    /// A scheduled maintenance event (`instance-stop`, `system-reboot`, ...) that starts at `not_before`.
    pub async fn events(node: &TestNode, delay: Duration, code: &str, not_before: Timestamp) -> Self {
        let time = not_before.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        Self::start(node, delay, &["events", "--code", code, "--state", "active", "--not-before", &time]).await
    }

    /// `autoscaling/target-lifecycle-state` becomes `Terminated` after `delay`.
    pub async fn asg(node: &TestNode, delay: Duration) -> Self {
        let delay_asg = format!("--asg-termination-delay-sec={}", delay.as_secs());
        Self::start(node, delay, &["asglifecycle", &delay_asg]).await
    }

    /// Any command of the mock. Needs [`available`](super::controlplane::available); returns when it answers.
    pub async fn start(node: &TestNode, delay: Duration, args: &[&str]) -> Self {
        let port = free_port();
        let values = json!({"metadata": {"values": {"instance-id": node.instance_id, "instance-type": "m7i.large",
            "placement-availability-zone": "eu-central-1a", "placement-region": "eu-central-1"}}});
        let config = keeper().file("aemm.json", &values.to_string());
        let readable = Timestamp::now() + delay;
        let process = Process::program(asset("ec2-metadata-mock").expect("KUBEBUILDER_ASSETS is set"), args)
            .args(["--imdsv2", "--hostname=127.0.0.1", &format!("--port={port}")])
            .args([format!("--mock-delay-sec={}", delay.as_secs()), format!("--config-file={}", config.display())])
            .start();
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        let mock = Self { process, address, url: format!("http://{address}"), readable };
        eventually("the metadata mock answers", Duration::from_secs(20), || async { mock.get("instance-id").await })
            .await;
        mock
    }

    /// The text at `/latest/meta-data/<path>`, with a token; None where the answer is not 200.
    pub async fn get(&self, path: &str) -> Option<String> {
        let ttl = [("X-aws-ec2-metadata-token-ttl-seconds", "60")];
        let token = http(self.address, "PUT", "/latest/api/token", &ttl).await.ok()?.body;
        let token = [("X-aws-ec2-metadata-token", token.trim())];
        let answer = http(self.address, "GET", &format!("/latest/meta-data/{path}"), &token).await.ok()?;
        (answer.code == 200).then_some(answer.body)
    }
}
