//! The connections: HTTP/2, HTTP/1.1 where there is nothing else, and who may hold up whom.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use prometheus_client::registry::Registry;
use spotter::{
    cluster::{IdentityChoice, Manager, NodeIntent},
    plan::Answer,
};

use super::{NODE, SECOND, connect, kubeconfig, pod, within};

/// For the TLS servers below. Nobody trusts it: the kubeconfig skips the check.
const CERTIFICATE: &str = "
-----BEGIN CERTIFICATE-----
MIIBmzCCAUGgAwIBAgIUCRiTmi3UJxPzuaOjGQYZCj6ebRYwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyMzA0NTYxM1oYDzIxMjYxMDMw
MDQ1NjEzWjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAASSqBPAX1CVRYCSYBwe5jpH8k5SWn0qvMdMsPjYyyClh/E3rBUZ2oHB
Cu8ePg56EwZ40AhnxV9tX7S6mUEXZ0Aeo28wbTAdBgNVHQ4EFgQUebBiY6r+Dne8
4N3ZIqK0g6TARmMwHwYDVR0jBBgwFoAUebBiY6r+Dne84N3ZIqK0g6TARmMwDwYD
VR0TAQH/BAUwAwEB/zAaBgNVHREEEzARhwR/AAABgglsb2NhbGhvc3QwCgYIKoZI
zj0EAwIDSAAwRQIhAPG/f+aMqDFVCMGNeQ2z5vY8JpjBExDpBsaP6VDTVpKNAiBO
SA6CueJhbpk0uwczL1T+0L8khNOmDnXWmwoVNkJ/AQ==
-----END CERTIFICATE-----
";
const KEY: &str = "
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgzv2gAXlYD0phVE10
cMJ78nFkX/t3cnQnhMP/uX6WJe2hRANCAASSqBPAX1CVRYCSYBwe5jpH8k5SWn0q
vMdMsPjYyyClh/E3rBUZ2oHBCu8ePg56EwZ40AhnxV9tX7S6mUEXZ0Ae
-----END PRIVATE KEY-----
";

fn tls_config(alpn: &[&str]) -> Arc<rustls::ServerConfig> {
    use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
    let certificate = CertificateDer::from_pem_slice(CERTIFICATE.as_bytes()).unwrap();
    let key = PrivateKeyDer::from_pem_slice(KEY.as_bytes()).unwrap();
    let config = rustls::ServerConfig::builder().with_no_client_auth().with_single_cert(vec![certificate], key);
    let mut config = config.unwrap();
    config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    Arc::new(config)
}

/// A TLS server that speaks HTTP/1.1 only and answers every request with the Node.
fn tls_http1(alpn: &[&str]) -> String {
    use std::io::{Read, Write};
    let config = tls_config(alpn);
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("https://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let config = config.clone();
            std::thread::spawn(move || {
                let mut tls = rustls::StreamOwned::new(rustls::ServerConnection::new(config).unwrap(), stream);
                let mut buffer = [0; 4096];
                while let Ok(length) = tls.read(&mut buffer)
                    && length > 0
                {
                    assert!(buffer.starts_with(b"GET /api/v1/nodes/n1 HTTP/1.1\r\n"));
                    let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{NODE}", NODE.len());
                    tls.write_all(answer.as_bytes()).unwrap();
                }
            });
        }
    });
    url
}

#[tokio::test]
async fn a_server_without_http2_is_spoken_to_in_http1() {
    for alpn in [&["http/1.1"][..], &[]] {
        let config = kubeconfig(&tls_http1(alpn));
        let mut registry = Registry::default();
        let cluster = connect(config.path().to_owned(), IdentityChoice::Auto, &mut registry).await;
        for _ in 0..3 {
            assert_eq!(within(cluster.node(SECOND)).await.unwrap().uid, "nu", "ALPN {alpn:?}");
        }
    }
}

/// A TLS server that speaks HTTP/2 only, answers every request with the Node, and counts its connections.
async fn tls_http2(connections: Arc<AtomicUsize>) -> String {
    let acceptor = tokio_rustls::TlsAcceptor::from(tls_config(&["h2"]));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            connections.fetch_add(1, Ordering::Relaxed);
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let mut connection = h2::server::handshake(acceptor.accept(stream).await.unwrap()).await.unwrap();
                while let Some(Ok((_, mut respond))) = connection.accept().await {
                    let mut body = respond.send_response(http::Response::new(()), false).unwrap();
                    body.send_data(NODE.into(), true).unwrap();
                }
            });
        }
    });
    url
}

#[tokio::test]
async fn each_purpose_has_its_connections_and_no_more() {
    let connections = Arc::<AtomicUsize>::default();
    let config = kubeconfig(&tls_http2(connections.clone()).await);
    let mut registry = Registry::default();
    let cluster = connect(config.path().to_owned(), IdentityChoice::Auto, &mut registry).await;
    let intent = NodeIntent::default();
    let claims = (0..20).map(|_| cluster.apply(&intent, Manager::Agent, false, 0, SECOND));
    assert!(futures::future::join_all(claims).await.iter().all(Result::is_ok));
    assert_eq!(connections.load(Ordering::Relaxed), 1);
    let (pod, cluster) = (&pod(), &cluster);
    let evictions = (0..110).map(|_| cluster.evict(pod, None, 5 * SECOND));
    assert!(futures::future::join_all(evictions).await.iter().all(|answer| *answer == Answer::Accepted));
    assert_eq!(connections.load(Ordering::Relaxed), 3);
}

#[tokio::test]
async fn connections_opened_ahead_are_the_ones_that_a_drain_uses() {
    let connections = Arc::<AtomicUsize>::default();
    let config = kubeconfig(&tls_http2(connections.clone()).await);
    let cluster = connect(config.path().to_owned(), IdentityChoice::Auto, &mut Registry::default()).await;
    cluster.expect_drain();
    let claim = cluster.apply(&NodeIntent::default(), Manager::Agent, false, 0, SECOND).await;
    assert!(claim.is_ok(), "{claim:?}");
    let all = async {
        while connections.load(Ordering::Relaxed) < 4 {
            tokio::task::yield_now().await
        }
    };
    within(all).await;
    let (pod, cluster) = (&pod(), &cluster);
    let evict = || futures::future::join_all((0..10).map(|_| cluster.evict(pod, None, 5 * SECOND)));
    assert!(evict().await.iter().all(|answer| *answer == Answer::Accepted));
    assert_eq!(connections.load(Ordering::Relaxed), 4, "one for the claim, two for evictions, one for watches");
    // Expected again while they are open, nothing changes for those that use them.
    cluster.expect_drain();
    assert!(evict().await.iter().all(|answer| *answer == Answer::Accepted));
}

#[tokio::test]
async fn a_request_that_nobody_polls_does_not_hold_up_the_claim() {
    let config = kubeconfig(&tls_http2(Arc::default()).await);
    // The watch is left alone after ever more steps of opening the connection that the claim waits for.
    for steps in 1..12 {
        let cluster = connect(config.path().to_owned(), IdentityChoice::Auto, &mut Registry::default()).await;
        let mut watch = cluster.watch_node(String::new());
        let mut started = std::pin::pin!(watch.next());
        for _ in 0..steps {
            std::future::poll_fn(|context| std::task::Poll::Ready(started.as_mut().poll(context).is_pending())).await;
            tokio::task::yield_now().await;
        }
        let claim = cluster.apply(&NodeIntent::default(), Manager::Agent, false, 0, SECOND).await;
        assert!(claim.is_ok(), "after {steps} steps: {claim:?}");
    }
}
