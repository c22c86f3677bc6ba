//! `mesh admin`: operations on a coordinator of this host, through its socket.

use std::fmt::Display;

use comfy_table::{Table, presets};
use mesh_control::admin::{Client, CreateKey, KeyInfo, NodeInfo, UserInfo};
use serde::Serialize;

use crate::cli::{Admin, AdminCommand, CodesCommand, Format, KeysCommand, KeysCreate, NodesCommand, UsersCommand};
use crate::output;

/// Runs one operation and prints its result.
pub(crate) async fn run(options: Admin) -> anyhow::Result<()> {
    let client = Client::new(&options.state_dir);
    let printer = Printer(options.output);
    match options.command {
        AdminCommand::Users(UsersCommand::Create { name }) => {
            let user = client.create_user(&name).await?;
            printer.one(&user, |user| format!("user {} created", user.name))
        }
        AdminCommand::Users(UsersCommand::List) => printer.one(&client.users().await?, |users| users_table(users)),
        AdminCommand::Codes(CodesCommand::Create { user }) => {
            let code = client.create_code(user.as_deref()).await?;
            printer.one(&code, |code| format!("{}\ngood for one sign-in until {}", code.code, code.expires))
        }
        AdminCommand::Keys(KeysCommand::Create(wanted)) => {
            let key = client.create_key(&create_key(wanted)).await?;
            printer.one(&key, |key| key.key.clone().unwrap_or_default())
        }
        AdminCommand::Keys(KeysCommand::List) => printer.one(&client.keys().await?, |keys| keys_table(keys)),
        AdminCommand::Nodes(command) => nodes(&client, command, &printer).await,
        AdminCommand::Relay => {
            let relay = client.relay().await?;
            printer.one(&relay, |relay| {
                format!(
                    "{} nodes, {} packets ({}) in, {} packets ({}) out",
                    relay.nodes,
                    relay.packets_in,
                    output::bytes(relay.bytes_in),
                    relay.packets_out,
                    output::bytes(relay.bytes_out)
                )
            })
        }
    }
}

async fn nodes(client: &Client, command: NodesCommand, printer: &Printer) -> anyhow::Result<()> {
    match command {
        NodesCommand::List => printer.one(&client.nodes().await?, |nodes| nodes_table(nodes)),
        NodesCommand::Approve { request, user } => {
            let login = client.approve(&request, &user).await?;
            printer.one(&login, |login| format!("{} may join as a node of {user}", login.hostname))
        }
        NodesCommand::Rename { node, name } => {
            let renamed = client.rename_node(&node, &name).await?;
            printer.one(&renamed, |node| format!("now called {}", node.fqdn))
        }
        NodesCommand::Expire { node } => {
            let expired = client.expire_node(&node).await?;
            printer.one(&expired, |node| format!("{} has to sign in again", node.name))
        }
        NodesCommand::Delete { node } => {
            let deleted = client.delete_node(&node).await?;
            printer.one(&deleted, |node| format!("{} is forgotten", node.name))
        }
    }
}

fn create_key(wanted: KeysCreate) -> CreateKey {
    CreateKey {
        user: wanted.user,
        reusable: wanted.reusable,
        ephemeral: wanted.ephemeral,
        tags: wanted.tag,
        expiry_seconds: Some(wanted.expiry.as_secs()),
    }
}

struct Printer(Format);

impl Printer {
    fn one<T: Serialize>(&self, value: &T, text: impl FnOnce(&T) -> String) -> anyhow::Result<()> {
        match self.0 {
            Format::Json => output::print(&serde_json::to_string(value)?)?,
            Format::Text => output::print(&text(value))?,
        }
        Ok(())
    }
}

fn users_table(users: &[UserInfo]) -> String {
    table(["ID", "NAME", "SINCE"], users.iter().map(|user| [text(user.id), user.name.clone(), text(user.created)]))
}

fn keys_table(keys: &[KeyInfo]) -> String {
    table(
        ["ID", "USER", "KIND", "TAGS", "EXPIRES", "LAST USED"],
        keys.iter().map(|key| {
            let kind = match (key.reusable, key.ephemeral) {
                (false, false) => "one-off",
                (true, false) => "reusable",
                (false, true) => "one-off, ephemeral",
                (true, true) => "reusable, ephemeral",
            };
            let used = key.used.as_ref().map_or_else(|| "never".to_owned(), text);
            [text(key.id), key.user.clone(), kind.to_owned(), key.tags.join(" "), text(key.expires), used]
        }),
    )
}

fn nodes_table(nodes: &[NodeInfo]) -> String {
    table(
        ["ID", "NAME", "OWNER", "ADDRESS", "OS", "ONLINE", "LAST SEEN"],
        nodes.iter().map(|node| {
            let online = match (node.expired, node.online) {
                (true, _) => "expired",
                (false, true) => "yes",
                (false, false) => "no",
            };
            let seen = node.last_seen.as_ref().map_or_else(|| "-".to_owned(), text);
            let address = node.addresses.first().map_or_else(|| "-".to_owned(), text);
            let owner = if node.tags.is_empty() { node.user.clone() } else { node.tags.join(" ") };
            [text(node.id), node.name.clone(), owner, address, node.os.clone(), online.to_owned(), seen]
        }),
    )
}

fn table<const N: usize>(header: [&str; N], rows: impl Iterator<Item = [String; N]>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header);
    for row in rows {
        table.add_row(row);
    }
    let lines: Vec<String> = table.lines().map(|line| line.trim().to_owned()).collect();
    lines.join("\n")
}

fn text(value: impl Display) -> String {
    value.to_string()
}
