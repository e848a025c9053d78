//! What stands between a peer and its relay, played by the test: ends of TLS, reverse proxies, proxies, and servers that
//! are none of these.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use data_encoding::BASE64;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, copy_bidirectional},
    net::{TcpListener, TcpStream},
    task::{JoinHandle, JoinSet},
};
use tokio_rustls::{TlsAcceptor, rustls::ServerConfig};

/// A server on a port of its own; it ends, with its connections, when dropped.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    heads: Heads,
    running: JoinHandle<()>,
}

/// The requests that a server read.
type Heads = Arc<Mutex<Vec<String>>>;

/// What a server does with a connection.
#[derive(Clone)]
pub(crate) enum Manner {
    /// Passes all bytes on to this address.
    Forward(SocketAddr),
    /// Passes requests beneath this path on to that address, without the path; others are answered with 404.
    Strip(&'static str, SocketAddr),
    /// Connects whoever shows these credentials to that address, whatever `CONNECT` asks for.
    Tunnel(Option<&'static str>, SocketAddr),
    /// Connects to whatever `CONNECT` asks for.
    OpenTunnel,
    /// Reads a request, answers it with these bytes, and closes.
    Says(&'static str),
    /// Reads, and answers nothing.
    Silent,
    /// Never ends its answer.
    Endless,
}

/// A stream of bytes, TLS or not.
trait Connection: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Connection for T {}

impl Server {
    pub(crate) async fn plain(manner: Manner) -> Self {
        Self::start(None, manner).await
    }

    pub(crate) async fn tls(config: Arc<ServerConfig>, manner: Manner) -> Self {
        Self::start(Some(config.into()), manner).await
    }

    async fn start(tls: Option<TlsAcceptor>, manner: Manner) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let heads = Heads::default();
        let keep = Arc::clone(&heads);
        let running = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let (tls, manner, keep) = (tls.clone(), manner.clone(), Arc::clone(&keep));
                connections.spawn(async move {
                    let stream: Box<dyn Connection> = match tls {
                        None => Box::new(stream),
                        Some(tls) => match tls.accept(stream).await {
                            Ok(stream) => Box::new(stream),
                            Err(_) => return,
                        },
                    };
                    serve(stream, manner, keep).await;
                });
            }
        });
        Self { address, heads, running }
    }

    /// The heads of the requests that it read.
    pub(crate) fn heads(&self) -> Vec<String> {
        self.heads.lock().unwrap().clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.running.abort();
    }
}

async fn serve(mut stream: Box<dyn Connection>, manner: Manner, heads: Heads) {
    if let Manner::Forward(to) = manner {
        return forward(stream, to, b"").await;
    }
    let Some(head) = read_head(&mut stream).await else { return };
    heads.lock().unwrap().push(head.clone());
    match manner {
        Manner::Forward(_) => {}
        Manner::Strip(path, to) => match head.strip_prefix(&format!("GET {path}/")) {
            Some(rest) => forward(stream, to, format!("GET /{rest}").as_bytes()).await,
            None => say(stream, "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n").await,
        },
        Manner::Tunnel(credentials, to) => {
            let wanted = credentials
                .map(|pair| format!("\r\nProxy-Authorization: Basic {}\r\n", BASE64.encode(pair.as_bytes())));
            if wanted.is_none_or(|wanted| head.contains(&wanted)) {
                tunnel(stream, to).await;
            } else {
                say(stream, "HTTP/1.1 407 Who are you\r\nProxy-Authenticate: Basic realm=\"x\"\r\n\r\n").await;
            }
        }
        Manner::OpenTunnel => tunnel(stream, head.split(' ').nth(1).unwrap().parse().unwrap()).await,
        Manner::Says(words) => say(stream, words).await,
        Manner::Silent => std::future::pending().await,
        Manner::Endless => {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nX-Long: ").await;
            while stream.write_all(&[b'x'; 1024]).await.is_ok() {}
        }
    }
}

async fn tunnel(mut stream: Box<dyn Connection>, to: SocketAddr) {
    if stream.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n").await.is_ok() {
        forward(stream, to, b"").await;
    }
}

async fn say(mut stream: Box<dyn Connection>, words: &str) {
    // Whoever asked may have gone.
    let _ = stream.write_all(words.as_bytes()).await;
    let _ = stream.shutdown().await;
    // A socket that is closed with bytes unread takes back what it said.
    let _ = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
}

async fn forward(mut stream: Box<dyn Connection>, to: SocketAddr, first: &[u8]) {
    let Ok(mut onward) = TcpStream::connect(to).await else { return };
    if onward.write_all(first).await.is_ok() {
        // Either side may break off.
        let _ = copy_bidirectional(&mut stream, &mut onward).await;
    }
}

/// A request's head, read byte by byte so that nothing behind it is taken; `None` if it does not come.
async fn read_head(stream: &mut Box<dyn Connection>) -> Option<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.ok()?);
        if !head.is_ascii() {
            break;
        }
    }
    Some(String::from_utf8_lossy(&head).into_owned())
}
