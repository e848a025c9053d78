use std::sync::{
    Arc, Mutex,
    atomic::{AtomicU8, Ordering},
};
use std::time::Instant;

use peerfleet_proto::request::network::MappingProtocol;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
    sync::mpsc,
};

use super::*;
use crate::mesh::surroundings::Told;

const EXTERNAL: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 7);
const PORT: u16 = 40_000;

/// An address of loopback that no other test and no other process of tests uses: these protocols' port is always 5351.
fn own_loopback() -> Ipv4Addr {
    static NEXT: AtomicU8 = AtomicU8::new(1);
    let pid = std::process::id();
    Ipv4Addr::new(127, 64 | (pid >> 8) as u8 & 63, pid as u8, NEXT.fetch_add(1, Ordering::Relaxed))
}

fn place(gateway: Ipv4Addr, search: SocketAddr) -> Place {
    Place { gateway, client: Ipv4Addr::LOCALHOST, search, shortest_life: Duration::ZERO }
}

fn port() -> NonZeroU16 {
    NonZeroU16::new(PORT).unwrap()
}

/// A search that reaches nobody.
fn nowhere() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 9))
}

/// What a router was asked: a protocol and a life in seconds.
type Log = Arc<Mutex<Vec<(&'static str, u32)>>>;

fn long_of(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap())
}

/// Answers NAT-PMP, and PCP unless it is too old for that.
async fn router(ip: Ipv4Addr, external: Ipv4Addr, life: u32, knows_pcp: bool) -> Log {
    let socket = UdpSocket::bind((ip, crab_nat::GATEWAY_PORT)).await.unwrap();
    let log = Log::default();
    let heard = Arc::clone(&log);
    tokio::spawn(async move {
        let mut buffer = [0; 1100];
        loop {
            let (len, from) = socket.recv_from(&mut buffer).await.unwrap();
            let request = &buffer[..len];
            let answer = match (request[0], request[1]) {
                (2, 1) if knows_pcp => {
                    heard.lock().unwrap().push(("PCP", long_of(request, 4)));
                    pcp_answer(request, external, life)
                }
                (2, _) => vec![0, 128, 0, 1, 0, 0, 0, 1],
                (0, 0) => [&[0, 128, 0, 0, 0, 0, 0, 1], &external.octets()[..]].concat(),
                (0, 1) => {
                    let asked = long_of(request, 8);
                    heard.lock().unwrap().push(("NAT-PMP", asked));
                    let port = if asked == 0 { [0, 0] } else { 50_000_u16.to_be_bytes() };
                    [&[0, 129, 0, 0, 0, 0, 0, 1], &request[4..6], &port, &life.min(asked).to_be_bytes()[..]].concat()
                }
                other => panic!("a request of another kind: {other:?}"),
            };
            socket.send_to(&answer, from).await.unwrap();
        }
    });
    log
}

fn pcp_answer(request: &[u8], external: Ipv4Addr, life: u32) -> Vec<u8> {
    let asked = long_of(request, 4);
    let mut answer = vec![2, 0x81, 0, 0];
    answer.extend(life.min(asked).to_be_bytes());
    answer.extend(1_u32.to_be_bytes());
    answer.extend([0; 12]);
    // Nonce, protocol, reserved and the internal port come back as they were.
    answer.extend(&request[24..42]);
    answer.extend(50_000_u16.to_be_bytes());
    answer.extend(external.to_ipv6_mapped().octets());
    answer
}

async fn told(facts: &mut mpsc::Receiver<Told>) -> PortMapping {
    let Fact::Router(told) = facts.recv().await.unwrap().fact else { panic!("a fact of another kind") };
    told
}

/// What is told of a mapping to this port outside, for so many seconds.
fn open(protocol: MappingProtocol, port: u16, life: u64) -> PortMapping {
    PortMapping::Open { protocol, addr: SocketAddr::new(EXTERNAL.into(), port), life: Duration::from_secs(life) }
}

fn keeper(place: Place) -> (Keeper, mpsc::Receiver<Told>) {
    let (tell, facts) = Teller::new();
    let (stop, stopped) = oneshot::channel();
    let find = move || std::future::ready(Ok(place));
    (Keeper { stop, task: tokio::spawn(keep(find, port(), tell, stopped)) }, facts)
}

#[tokio::test]
async fn a_router_that_speaks_pcp_forwards_and_is_told_when_it_is_over() {
    let gateway = own_loopback();
    let log = router(gateway, EXTERNAL, 7200, true).await;
    let (keeper, mut facts) = keeper(place(gateway, nowhere()));
    assert_eq!(told(&mut facts).await, open(MappingProtocol::Pcp, 50_000, 3600));
    keeper.release().await;
    assert_eq!(*log.lock().unwrap(), [("PCP", 3600), ("PCP", 0)]);
}

#[tokio::test]
async fn a_router_that_speaks_nat_pmp_alone_forwards_and_is_told_when_it_is_over() {
    let gateway = own_loopback();
    let log = router(gateway, EXTERNAL, 7200, false).await;
    let (keeper, mut facts) = keeper(place(gateway, nowhere()));
    assert_eq!(told(&mut facts).await, open(MappingProtocol::NatPmp, 50_000, 3600));
    keeper.release().await;
    assert_eq!(*log.lock().unwrap(), [("NAT-PMP", 3600), ("NAT-PMP", 0)]);
}

#[tokio::test]
async fn a_router_that_opens_no_port_is_told_with_what_it_speaks() {
    let gateway = own_loopback();
    let socket = UdpSocket::bind((gateway, crab_nat::GATEWAY_PORT)).await.unwrap();
    tokio::spawn(async move {
        let mut buffer = [0; 1100];
        loop {
            let (len, from) = socket.recv_from(&mut buffer).await.unwrap();
            let mut answer = pcp_answer(&buffer[..len], EXTERNAL, 0);
            // NOT_AUTHORIZED (RFC 6887 §7.4).
            answer[3] = 2;
            socket.send_to(&answer, from).await.unwrap();
        }
    });
    let refused = PortMapping::Refused { protocol: MappingProtocol::Pcp };
    assert_eq!(ask(&place(gateway, nowhere()), port()).await.err(), Some(refused));
}

#[tokio::test]
async fn a_mapping_is_renewed_at_half_its_life() {
    let gateway = own_loopback();
    let log = router(gateway, EXTERNAL, 1, true).await;
    let (keeper, mut facts) = keeper(place(gateway, nowhere()));
    let began = Instant::now();
    for _ in 0..3 {
        assert_eq!(told(&mut facts).await, open(MappingProtocol::Pcp, 50_000, 1));
    }
    assert!(began.elapsed() >= Duration::from_secs(1), "{:?}", began.elapsed());
    assert_eq!(*log.lock().unwrap(), [("PCP", 3600), ("PCP", 1), ("PCP", 1)]);
    keeper.release().await;
}

#[tokio::test]
async fn an_address_behind_another_nat_is_not_offered_and_given_back() {
    let gateway = own_loopback();
    let log = router(gateway, Ipv4Addr::new(100, 64, 0, 9), 7200, true).await;
    let addr = SocketAddr::new(Ipv4Addr::new(100, 64, 0, 9).into(), 50_000);
    let nested = PortMapping::Nested { protocol: MappingProtocol::Pcp, addr };
    assert_eq!(ask(&place(gateway, nowhere()), port()).await.err(), Some(nested));
    assert_eq!(*log.lock().unwrap(), [("PCP", 3600), ("PCP", 0)]);
}

#[tokio::test]
async fn without_a_router_that_answers_that_is_told_and_leaving_takes_no_time() {
    let (keeper, mut facts) = keeper(place(own_loopback(), nowhere()));
    assert_eq!(told(&mut facts).await, PortMapping::NoAnswer);
    timeout(RELEASE / 2, keeper.release()).await.expect("nothing is there to be given back");
}

mod upnp {
    use super::*;

    const DESCRIPTION: &str = "<root xmlns=\"urn:schemas-upnp-org:device-1-0\"><device><serviceList><service>\
        <serviceType>urn:schemas-upnp-org:service:WANIPConnection:1</serviceType>\
        <SCPDURL>/actions.xml</SCPDURL><controlURL>/control</controlURL></service></serviceList></device></root>";

    /// The arguments of each action that the gateway knows.
    const ACTIONS: [(&str, &[&str]); 3] = [
        ("GetExternalIPAddress", &[]),
        (
            "AddPortMapping",
            &[
                "NewRemoteHost",
                "NewExternalPort",
                "NewProtocol",
                "NewInternalPort",
                "NewInternalClient",
                "NewEnabled",
                "NewPortMappingDescription",
                "NewLeaseDuration",
            ],
        ),
        ("DeletePortMapping", &["NewRemoteHost", "NewExternalPort", "NewProtocol"]),
    ];

    fn actions() -> String {
        let argument = |name: &&str| format!("<argument><name>{name}</name><direction>in</direction></argument>");
        let action = |(name, arguments): &(&str, &[&str])| {
            let list: String = arguments.iter().map(argument).collect();
            format!("<action><name>{name}</name><argumentList>{list}</argumentList></action>")
        };
        let list: String = ACTIONS.iter().map(action).collect();
        format!("<scpd xmlns=\"urn:schemas-upnp-org:service-1-0\"><actionList>{list}</actionList></scpd>")
    }

    /// A gateway that answers searches and forwards; gives where to search, and what it was told to do.
    async fn gateway(ip: Ipv4Addr) -> (SocketAddr, Arc<Mutex<Vec<String>>>) {
        let search = UdpSocket::bind((ip, 0)).await.unwrap();
        let web = TcpListener::bind((ip, 0)).await.unwrap();
        let (reached, at) = (search.local_addr().unwrap(), web.local_addr().unwrap());
        tokio::spawn(async move {
            let mut buffer = [0; 1500];
            loop {
                let (_, from) = search.recv_from(&mut buffer).await.unwrap();
                let answer = format!("HTTP/1.1 200 OK\r\nLOCATION: http://{at}/description.xml\r\n\r\n");
                search.send_to(answer.as_bytes(), from).await.unwrap();
            }
        });
        let told: Arc<Mutex<Vec<String>>> = Arc::default();
        let log = Arc::clone(&told);
        tokio::spawn(async move {
            while let Ok((stream, _)) = web.accept().await {
                tokio::spawn(serve(stream, Arc::clone(&log)));
            }
        });
        (reached, told)
    }

    async fn serve(mut stream: TcpStream, log: Arc<Mutex<Vec<String>>>) {
        let mut request = String::new();
        let mut buffer = [0; 4096];
        while !is_whole(&request) {
            let len = stream.read(&mut buffer).await.unwrap();
            if len == 0 {
                return;
            }
            request.push_str(std::str::from_utf8(&buffer[..len]).unwrap());
        }
        let body = if request.starts_with("GET /description.xml") {
            DESCRIPTION.to_owned()
        } else if request.starts_with("GET /actions.xml") {
            actions()
        } else {
            let (action, _) = ACTIONS.iter().find(|(name, _)| request.contains(&format!("#{name}\""))).unwrap();
            log.lock().unwrap().push(format!("{action} {}", lease_of(&request)).trim().to_owned());
            let inside = if *action == "GetExternalIPAddress" {
                format!("<NewExternalIPAddress>{EXTERNAL}</NewExternalIPAddress>")
            } else {
                String::new()
            };
            format!(
                "<s:Envelope xmlns:s=\"http://schemas.xmlsoap.org/soap/envelope/\"><s:Body>\
                 <u:{action}Response xmlns:u=\"urn:schemas-upnp-org:service:WANIPConnection:1\">{inside}\
                 </u:{action}Response></s:Body></s:Envelope>"
            )
        };
        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
        stream.write_all((head + &body).as_bytes()).await.unwrap();
    }

    fn is_whole(request: &str) -> bool {
        let Some((head, body)) = request.split_once("\r\n\r\n") else { return false };
        let length = head
            .lines()
            .find_map(|line| line.to_ascii_lowercase().strip_prefix("content-length:")?.trim().parse().ok());
        body.len() >= length.unwrap_or(0)
    }

    fn lease_of(request: &str) -> &str {
        let behind = request.split_once("<NewLeaseDuration>").map_or("", |(_, behind)| behind);
        behind.split_once('<').map_or("", |(lease, _)| lease)
    }

    #[tokio::test]
    async fn a_router_that_speaks_upnp_alone_forwards_for_a_time_and_is_told_when_it_is_over() {
        let ip = own_loopback();
        let (search, told) = gateway(ip).await;
        let (keeper, mut facts) = keeper(place(ip, search));
        assert_eq!(super::told(&mut facts).await, open(MappingProtocol::Upnp, PORT, 3600));
        keeper.release().await;
        assert_eq!(*told.lock().unwrap(), ["GetExternalIPAddress", "AddPortMapping 3600", "DeletePortMapping"]);
    }

    /// Hears everything, says nothing; notes what it heard.
    fn mute(socket: UdpSocket, what: &'static str, log: &Arc<Mutex<Vec<&'static str>>>) {
        let log = Arc::clone(log);
        tokio::spawn(async move {
            let mut buffer = [0; 1500];
            while socket.recv_from(&mut buffer).await.is_ok() {
                log.lock().unwrap().push(what);
            }
        });
    }

    #[tokio::test]
    async fn a_router_that_says_nothing_to_pcp_is_searched_for_meanwhile() {
        let ip = own_loopback();
        let search = UdpSocket::bind((ip, 0)).await.unwrap();
        let reached = search.local_addr().unwrap();
        let log = Arc::default();
        mute(search, "search", &log);
        mute(UdpSocket::bind((ip, crab_nat::GATEWAY_PORT)).await.unwrap(), "PCP", &log);
        assert_eq!(ask(&place(ip, reached), port()).await.err(), Some(PortMapping::NoAnswer));
        let heard = log.lock().unwrap().clone();
        assert_eq!((heard.first(), heard.last()), (Some(&"PCP"), Some(&"PCP")), "{heard:?}");
        assert!(heard.contains(&"search"), "{heard:?}");
    }

    #[tokio::test]
    async fn a_router_that_speaks_pcp_is_not_searched_for_by_upnp() {
        let ip = own_loopback();
        let _log = router(ip, EXTERNAL, 7200, true).await;
        let (search, told) = gateway(ip).await;
        let mapping = ask(&place(ip, search), port()).await.ok().unwrap();
        assert_eq!((mapping.protocol(), told.lock().unwrap().len()), (MappingProtocol::Pcp, 0));
        mapping.release().await;
    }

    #[tokio::test]
    async fn who_is_not_the_gateway_is_not_believed() {
        let stranger = own_loopback();
        let (search, told) = gateway(stranger).await;
        assert_eq!(ask(&place(own_loopback(), search), port()).await.err(), Some(PortMapping::NoAnswer));
        assert!(told.lock().unwrap().is_empty());
    }
}
