//! The mock of the metadata service, asked as any client would, and the command line of its verb.

// Helpers of tests are outside what `allow-unwrap-in-tests` covers.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::time::Duration;

use jiff::Timestamp;
use reqwest::{Client, Method, Response};
use serde_json::Value;
use spotter::{
    cli::imds::{command, run, script},
    rehearsal::imds::{Ending, Machine, MockImds, ScriptKind, Scripted},
};
use tokio::{sync::mpsc, task::JoinSet};
use tokio_util::sync::CancellationToken;

const TTL: &str = "x-aws-ec2-metadata-token-ttl-seconds";

struct Mock {
    control: spotter::rehearsal::imds::Control,
    url: String,
    http: Client,
    _tasks: JoinSet<()>,
}

impl Mock {
    async fn new() -> Self {
        Self::serve(MockImds::bind("127.0.0.1:0".parse().unwrap(), Machine::default()).await.unwrap())
    }

    fn serve(mock: MockImds) -> Self {
        let http = Client::builder().no_proxy().build().unwrap();
        let (control, url, mut tasks) = (mock.control(), mock.url(), JoinSet::new());
        let serving = mock.serve(CancellationToken::new());
        tasks.spawn(async { serving.await.unwrap() });
        Self { control, url, http, _tasks: tasks }
    }

    async fn put(&self, headers: &[(&str, &str)]) -> Response {
        let mut request = self.http.put(format!("{}/latest/api/token", self.url));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.send().await.unwrap()
    }

    async fn token(&self) -> String {
        self.put(&[(TTL, "60")]).await.text().await.unwrap()
    }

    async fn get(&self, token: &str, path: &str) -> (u16, String) {
        let request = self.http.get(format!("{}{path}", self.url)).header("X-aws-ec2-metadata-token", token);
        let response = request.send().await.unwrap();
        (response.status().as_u16(), response.text().await.unwrap())
    }
}

#[tokio::test]
async fn tokens_are_enforced() {
    let mock = Mock::new().await;
    for (headers, status) in [
        (&[][..], 400),
        (&[(TTL, "0")], 400),
        (&[(TTL, "21601")], 400),
        (&[(TTL, "long")], 400),
        (&[(TTL, "60"), ("X-Forwarded-For", "10.0.0.1")], 403),
        (&[(TTL, "1")], 200),
        (&[(TTL, "21600")], 200),
    ] {
        assert_eq!(mock.put(headers).await.status(), status, "{headers:?}");
    }
    let answer = mock.put(&[(TTL, "60")]).await;
    assert_eq!(answer.headers()[TTL], "60");
    let token = answer.text().await.unwrap();

    let path = "/latest/meta-data/instance-id";
    assert_eq!(mock.http.get(format!("{}{path}", mock.url)).send().await.unwrap().status(), 401);
    assert_eq!(mock.get("not-a-token", path).await.0, 401);
    assert_eq!(mock.get(&token, path).await, (200, "i-0a1b2c3d4e5f60718".into()));
    assert_eq!(mock.get(&token, "/2021-07-15/meta-data/instance-id").await.0, 200);
    for (method, path) in [(Method::POST, path), (Method::GET, "/latest/api/token")] {
        let answer = mock.http.request(method, format!("{}{path}", mock.url)).send().await.unwrap();
        assert_eq!(answer.status(), 405);
    }
    mock.control.drop_tokens();
    assert_eq!(mock.get(&token, path).await.0, 401);

    mock.control.longest_token(Duration::from_secs(1));
    let token = mock.token().await;
    while mock.get(&token, path).await.0 == 200 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(mock.get(&token, path).await.0, 401, "a token has an end");
}

#[tokio::test]
async fn paths_answer_as_the_real_ones() {
    let mock = Mock::new().await;
    let token = mock.token().await;
    for (path, body) in [
        ("instance-type", "m7g.2xlarge"),
        ("instance-life-cycle", "spot"),
        ("placement/availability-zone", "eu-central-1b"),
        ("placement/region", "eu-central-1"),
        ("events/maintenance/scheduled", "[]"),
        ("events/maintenance/history", "[]"),
        ("autoscaling/target-lifecycle-state", "InService"),
        ("placement/", "availability-zone\nregion"),
        ("events/", "maintenance/"),
    ] {
        assert_eq!(mock.get(&token, &format!("/latest/meta-data/{path}")).await, (200, body.to_owned()), "{path}");
    }
    let (status, list) = mock.get(&token, "/latest/meta-data/").await;
    assert!(status == 200 && list.contains("instance-id\n") && list.contains("placement/") && !list.contains("spot"));
    for path in
        ["spot/instance-action", "spot/termination-time", "events/recommendations/rebalance", "spot/", "nothing"]
    {
        let (status, page) = mock.get(&token, &format!("/latest/meta-data/{path}")).await;
        assert!(status == 404 && page.starts_with("<?xml") && page.contains("404 - Not Found"), "{path}: {page}");
    }
    let (_, document) = mock.get(&token, "/latest/dynamic/instance-identity/document").await;
    let document: Value = serde_json::from_str(&document).unwrap();
    assert_eq!(document["instanceId"], "i-0a1b2c3d4e5f60718");
    assert_eq!(document["availabilityZone"], "eu-central-1b");
    assert_eq!(document["version"], "2017-09-30");
    assert!(document["pendingTime"].as_str().unwrap().parse::<Timestamp>().is_ok());
}

#[tokio::test]
async fn a_script_plays() {
    let args =
        ["imds", "--notice", "spot,deadline=2m", "--notice", "maintenance", "--event-id", "e1", "--cancel-after"];
    let script = script(&command().get_matches_from(args.iter().chain(&["150ms"]))).unwrap();
    let (tell, mut happenings) = mpsc::unbounded_channel();
    let mock = MockImds::bind("127.0.0.1:0".parse().unwrap(), Machine::default()).await.unwrap();
    let mock = Mock::serve(mock.script(script).tell(tell));
    let mut lines = Vec::new();
    for _ in 0..3 {
        lines.push(happenings.recv().await.unwrap().text);
    }
    assert!(lines[0].starts_with("readable: spot interruption, terminate at "), "{lines:?}");
    assert!(lines[1].starts_with("readable: maintenance e1, system-reboot at "), "{lines:?}");
    assert_eq!(lines[2], "withdrawn: maintenance e1, canceled");

    let token = mock.token().await;
    let (_, body) = mock.get(&token, "/latest/meta-data/spot/instance-action").await;
    let notice: Value = serde_json::from_str(&body).unwrap();
    let time = notice["time"].as_str().unwrap();
    assert!(time.len() == "2026-11-20T08:17:02Z".len() && time.ends_with('Z'), "whole seconds: {time}");
    let readable = mock.control.readable("spot/instance-action").unwrap();
    let left = time.parse::<Timestamp>().unwrap().duration_since(readable.wall).as_secs_f64();
    assert!((118.0..=120.0).contains(&left), "{left}");
    let (_, termination) = mock.get(&token, "/latest/meta-data/spot/termination-time").await;
    assert_eq!(termination, time);
    let (_, history) = mock.get(&token, "/latest/meta-data/events/maintenance/history").await;
    let history: Value = serde_json::from_str(&history).unwrap();
    assert_eq!((&history[0]["EventId"], &history[0]["State"]), (&"e1".into(), &"canceled".into()));
    assert!(history[0]["Description"].as_str().unwrap().starts_with("[Canceled] "));
    assert_eq!(mock.get(&token, "/latest/meta-data/events/maintenance/scheduled").await.1, "[]");
}

fn parse(line: &str) -> Result<Vec<Scripted>, clap::Error> {
    let args = std::iter::once("imds").chain(line.split_whitespace());
    script(&command().try_get_matches_from(args)?)
}

#[test]
fn options_belong_to_the_notice_before_them() {
    let seconds = |seconds| Some(Duration::from_secs(seconds));
    let script = parse(
        "--notice rebalance --after 5s --until 9s --life-cycle spot --notice spot --deadline 2m --action stop \
         --notice maintenance,code=instance-stop --complete-after 1m --after 10s --notice asg --notice spot,after=1s",
    )
    .unwrap();
    let kinds: Vec<_> = script.iter().map(|notice| notice.kind).collect();
    use ScriptKind::{Asg, Maintenance, Rebalance, Spot};
    assert_eq!(kinds, [Rebalance, Spot, Maintenance, Asg, Spot]);
    assert_eq!((script[0].after, script[0].ends), (seconds(5), Some((Duration::from_secs(9), Ending::Cancelled))));
    assert_eq!((script[1].after, script[1].deadline, script[1].action.as_deref()), (None, seconds(120), Some("stop")));
    assert_eq!((script[2].after, script[2].code.as_deref()), (seconds(10), Some("instance-stop")));
    assert_eq!(script[2].ends, Some((Duration::from_secs(60), Ending::Completed)));
    assert_eq!((script[3].after, script[4].after), (None, seconds(1)));
    assert_eq!(parse("").unwrap(), []);
    command().debug_assert();
}

#[test]
fn wrong_options_are_named() {
    for (line, parts) in [
        ("--after 10s --notice spot", &["--after 10s", "no --notice comes before"][..]),
        ("--notice spot --code x", &["--code x", "only for maintenance"]),
        ("--notice spott", &["--notice spott", "spot, rebalance, maintenance, asg"]),
        ("--notice spot --after 10", &["--after 10", "500ms"]),
        ("--notice spot --after 1s --after 2s", &["--after 2s", "twice"]),
        ("--notice spot,after", &["`after` is not KEY=VALUE"]),
        ("--notice spot,colour=red", &["`colour` is no property"]),
        ("--notice maintenance --cancel-after 1s --complete-after 2s", &["--complete-after 2s", "contradicts"]),
        ("--listen here", &["--listen", "127.0.0.1:1338"]),
        ("--instance-id x", &["--instance-id"]),
        ("--zone x", &["--zone", "eu-central-1b"]),
        ("--life-cycle leased", &["--life-cycle", "on-demand"]),
    ] {
        let error = parse(line).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        let text = error.to_string();
        assert!(parts.iter().all(|part| text.contains(part)), "{line}: {text}");
    }
}

#[tokio::test]
async fn a_busy_port_is_a_clear_error() {
    let busy = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = busy.local_addr().unwrap().to_string();
    let error = run(&command().get_matches_from(["imds", "--listen", &address])).await.unwrap_err();
    let text = format!("{error:#}");
    assert!(text.contains(&address) && text.contains("--listen") && text.contains("in use"), "{text}");
    // Wrong options can be told from failures.
    let wrong = run(&command().get_matches_from(["imds", "--after", "1s"])).await.unwrap_err();
    assert!(wrong.downcast_ref::<clap::Error>().is_some());
}
