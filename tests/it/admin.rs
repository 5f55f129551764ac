//! The admin server over real sockets.

#![allow(clippy::expect_used, reason = "a helper that fails is a test that fails")]

use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use spotter::ops::{
    admin::{self, Admin},
    metrics::MetricsRegistry,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

const ANY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

struct Server {
    address: SocketAddr,
    tasks: TaskTracker,
    stop: CancellationToken,
}

fn admin() -> Admin {
    Admin::new(Arc::new(MetricsRegistry::new("agent")))
}

async fn start(admin: Admin) -> Server {
    let tasks = TaskTracker::new();
    let stop = CancellationToken::new();
    let address = admin::spawn(ANY, admin, &tasks, stop.clone()).await.expect("a free port");
    Server { address, tasks, stop }
}

/// Sends a request and reads until the server closes.
async fn raw(address: SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(address).await.expect("a connection");
    stream.write_all(request.as_bytes()).await.expect("a request");
    let mut answer = String::new();
    timeout(Duration::from_secs(5), stream.read_to_string(&mut answer)).await.expect("in time").expect("an answer");
    answer
}

/// Status and body.
async fn ask(address: SocketAddr, method: &str, path: &str) -> (u16, String) {
    let answer = raw(address, &format!("{method} {path} HTTP/1.1\r\nhost: x\r\n\r\n")).await;
    let status = answer.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status");
    let body = answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or_default();
    (status, body)
}

/// F26: whatever is asked, the server changes nothing: it knows three pages, and to read them is all one can do.
#[tokio::test]
async fn f26_it_only_reads() {
    let server = start(admin()).await;
    for path in ["/livez", "/readyz", "/metrics"] {
        assert_eq!(ask(server.address, "GET", path).await.0, 200, "{path}");
        assert_eq!(ask(server.address, "HEAD", path).await, (200, String::new()), "{path}");
        for method in ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "BREW"] {
            let target = if method == "CONNECT" { "x:1" } else { path };
            let (status, _) = ask(server.address, method, target).await;
            assert!(if method == "CONNECT" { status >= 400 } else { status == 405 }, "{method} {path}: {status}");
        }
    }
    for path in ["/", "/drain", "/livez/", "/healthz", "/metrics/../livez"] {
        for method in ["GET", "POST"] {
            let there_are = "not found: there are /livez, /readyz and /metrics\n".to_owned();
            assert_eq!(ask(server.address, method, path).await, (404, there_are), "{method} {path}");
        }
    }
}

#[tokio::test]
async fn not_ready_says_every_reason_and_stays_alive() {
    let healthy = Arc::new(AtomicBool::new(false));
    let flag = healthy.clone();
    let admin = admin()
        .ready_when(Arc::new(|| Ok(())))
        .ready_when(Arc::new(
            move || if flag.load(Ordering::Relaxed) { Ok(()) } else { Err("imds: no answer".to_owned()) },
        ))
        .ready_when(Arc::new(|| Err("api server: never reached".to_owned())));
    let server = start(admin).await;
    let (status, body) = ask(server.address, "GET", "/readyz").await;
    assert_eq!((status, body.as_str()), (503, "imds: no answer\napi server: never reached\n"));
    assert_eq!(ask(server.address, "GET", "/livez").await, (200, "ok\n".to_owned()));
    healthy.store(true, Ordering::Relaxed);
    assert_eq!(ask(server.address, "GET", "/readyz").await.1, "api server: never reached\n");
}

#[tokio::test]
async fn metrics_come_in_the_format_that_was_asked_for() {
    let server = start(admin()).await;
    let open = raw(
        server.address,
        "GET /metrics HTTP/1.1\r\nhost: x\r\naccept: application/openmetrics-text;version=1.0.0\r\n\r\n",
    )
    .await;
    assert!(open.contains("content-type: application/openmetrics-text; version=1.0.0; charset=utf-8\r\n"), "{open}");
    assert!(open.ends_with("# EOF\n") && open.contains("spotter_build_info{"), "{open}");
    let plain = raw(server.address, "GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n").await;
    assert!(plain.contains("content-type: text/plain; version=0.0.4; charset=utf-8\r\n"), "{plain}");
    assert!(!plain.contains("EOF") && plain.contains("# TYPE spotter_build_info gauge\n"), "{plain}");
}

#[tokio::test]
async fn a_busy_port_is_no_reason_to_stop() {
    let taken = TcpListener::bind(ANY).expect("a free port");
    let tasks = TaskTracker::new();
    let address = taken.local_addr().expect("an address");
    assert_eq!(admin::spawn(address, admin(), &tasks, CancellationToken::new()).await, None);
    assert!(tasks.is_empty());
}

/// 200 clients that connect and say nothing: the probe behind them is answered all the same.
#[tokio::test]
async fn silent_clients_do_not_keep_the_probe_out() {
    let server = start(admin()).await;
    let mut silent = Vec::new();
    for _ in 0..200 {
        silent.push(TcpStream::connect(server.address).await.expect("a connection"));
    }
    let answered = timeout(Duration::from_secs(2), ask(server.address, "GET", "/livez")).await.expect("in time");
    assert_eq!(answered, (200, "ok\n".to_owned()));
    // The oldest had to go.
    let mut byte = [0; 1];
    let closed = timeout(Duration::from_secs(2), silent[0].read(&mut byte)).await.expect("in time");
    assert!(matches!(closed, Ok(0) | Err(_)), "{closed:?}");
}

#[tokio::test]
async fn it_ends_when_told_to() {
    let server = start(admin()).await;
    server.stop.cancel();
    server.tasks.close();
    timeout(Duration::from_secs(2), server.tasks.wait()).await.expect("in time");
    assert!(TcpStream::connect(server.address).await.is_err());
}
