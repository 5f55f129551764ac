//! What the real service answers, word for word where it matters.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde_json::{Value, json};

use super::Machine;

const AMI: &str = "ami-0c1d2e3f405162738";
const PRIVATE_IP: &str = "10.0.12.34";
const ACCOUNT: &str = "210987654321";

/// The page that comes with an error, as the real one has it: XHTML, not JSON.
pub(super) fn error_page(status: u16, reason: &str) -> String {
    format!(
        "<?xml version=\"1.0\" encoding=\"iso-8859-1\"?>\n\
         <!DOCTYPE html PUBLIC \"-//W3C//DTD XHTML 1.0 Transitional//EN\"\n\
         \t\"http://www.w3.org/TR/xhtml1/DTD/xhtml1-transitional.dtd\">\n\
         <html xmlns=\"http://www.w3.org/1999/xhtml\" xml:lang=\"en\" lang=\"en\">\n \
         <head>\n  <title>{status} - {reason}</title>\n </head>\n <body>\n  <h1>{status} - {reason}</h1>\n </body>\n\
         </html>\n"
    )
}

/// Everything below `meta-data/` that does not change, and the target state of an instance in service.
pub(super) fn metadata(machine: &Machine) -> BTreeMap<String, String> {
    let host = format!("ip-{}.{}.compute.internal", PRIVATE_IP.replace('.', "-"), region(machine));
    [
        ("ami-id", AMI.to_owned()),
        ("hostname", host.clone()),
        ("instance-id", machine.instance_id.clone()),
        ("instance-life-cycle", machine.life_cycle.clone()),
        ("instance-type", machine.instance_type.clone()),
        ("local-hostname", host),
        ("local-ipv4", PRIVATE_IP.to_owned()),
        ("mac", "0a:1b:2c:3d:4e:5f".to_owned()),
        ("placement/availability-zone", machine.zone.clone()),
        ("placement/region", region(machine)),
        ("autoscaling/target-lifecycle-state", "InService".to_owned()),
    ]
    .map(|(path, body)| (path.to_owned(), body))
    .into()
}

/// `dynamic/instance-identity/document`, with the fields of the AWS page "Instance identity documents".
pub(super) fn identity_document(machine: &Machine, started: Timestamp) -> String {
    let document = json!({
        "accountId": ACCOUNT,
        "architecture": "arm64",
        "availabilityZone": machine.zone,
        "billingProducts": null,
        "devpayProductCodes": null,
        "marketplaceProductCodes": null,
        "imageId": AMI,
        "instanceId": machine.instance_id,
        "instanceType": machine.instance_type,
        "kernelId": null,
        "pendingTime": rfc3339(started),
        "privateIp": PRIVATE_IP,
        "ramdiskId": null,
        "region": region(machine),
        "version": "2017-09-30",
    });
    format!("{document:#}")
}

pub(super) fn instance_action(action: &str, time: Timestamp) -> String {
    json!({ "action": action, "time": rfc3339(time) }).to_string()
}

pub(super) fn rebalance(noticed_at: Timestamp) -> String {
    json!({ "noticeTime": rfc3339(noticed_at) }).to_string()
}

/// One scheduled event; its window is as long as the one of the example in the AWS documentation.
pub(super) fn event(id: &str, code: &str, start: Timestamp) -> Value {
    let end = start.saturating_add(jiff::SignedDuration::from_mins(17)).unwrap_or(start);
    json!({
        "NotBefore": date(start),
        "Code": code,
        "Description": format!("scheduled {}", code.rsplit('-').next().unwrap_or(code)),
        "EventId": id,
        "NotAfter": date(end),
        "State": "active",
    })
}

/// RFC 3339 in whole seconds, as AWS writes it.
pub(super) fn rfc3339(at: Timestamp) -> String {
    at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

fn date(at: Timestamp) -> String {
    at.strftime("%-d %b %Y %H:%M:%S GMT").to_string()
}

fn region(machine: &Machine) -> String {
    machine.region().unwrap_or_else(|| machine.zone.clone())
}
