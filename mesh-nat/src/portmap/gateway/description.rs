//! What the gateway's UPnP server says of itself: the device with its services, and what each service can be asked.

/// Where the device is described.
pub(super) const DESCRIPTION: &str = "/description.xml";
/// Where calls of the connection go.
pub(super) const CONTROL: &str = "/control";
/// Where calls of the firewall go.
pub(super) const FIREWALL_CONTROL: &str = "/firewall";
const CONNECTION_ACTIONS: &str = "/connection.xml";
const FIREWALL_ACTIONS: &str = "/firewall.xml";

/// A call's name, what it takes and what it gives.
type Call = (&'static str, &'static [&'static str], &'static [&'static str]);

const MAPPING: &[&str] = &[
    "NewRemoteHost",
    "NewExternalPort",
    "NewProtocol",
    "NewInternalPort",
    "NewInternalClient",
    "NewEnabled",
    "NewPortMappingDescription",
    "NewLeaseDuration",
];
const ADD_ANY: Call = ("AddAnyPortMapping", MAPPING, &["NewReservedPort"]);
const CONNECTION: [Call; 3] = [
    ("GetExternalIPAddress", &[], &["NewExternalIPAddress"]),
    ("AddPortMapping", MAPPING, &[]),
    ("DeletePortMapping", &["NewRemoteHost", "NewExternalPort", "NewProtocol"], &[]),
];
const HOLE: &[&str] = &["RemoteHost", "RemotePort", "InternalClient", "InternalPort", "Protocol", "LeaseTime"];
const FIREWALL: [Call; 3] = [
    ("AddPinhole", HOLE, &["UniqueID"]),
    ("UpdatePinhole", &["UniqueID", "NewLeaseTime"], &[]),
    ("DeletePinhole", &["UniqueID"], &[]),
];

/// The description of a device of the first or the second version.
pub(super) fn device(first_version: bool) -> String {
    let version = if first_version { 1 } else { 2 };
    let service = |kind: &str, id: &str, actions: &str, control: &str| {
        format!(
            "<service><serviceType>urn:schemas-upnp-org:service:{kind}</serviceType>\
             <serviceId>urn:upnp-org:serviceId:{id}</serviceId><SCPDURL>{actions}</SCPDURL>\
             <controlURL>{control}</controlURL><eventSubURL>/event</eventSubURL></service>"
        )
    };
    let mut services = service(&format!("WANIPConnection:{version}"), "WANIPConn1", CONNECTION_ACTIONS, CONTROL);
    if !first_version {
        services += &service("WANIPv6FirewallControl:1", "WANIPv6Firewall1", FIREWALL_ACTIONS, FIREWALL_CONTROL);
    }
    format!(
        "<?xml version=\"1.0\"?>\r\n<root xmlns=\"urn:schemas-upnp-org:device-1-0\"><specVersion><major>1</major>\
         <minor>1</minor></specVersion><device>\
         <deviceType>urn:schemas-upnp-org:device:InternetGatewayDevice:{version}</deviceType>\
         <friendlyName>laboratory</friendlyName><manufacturer>mesh</manufacturer><modelName>gateway</modelName>\
         <UDN>uuid:00000000-0000-0000-0000-000000000001</UDN><deviceList><device>\
         <deviceType>urn:schemas-upnp-org:device:WANDevice:{version}</deviceType>\
         <friendlyName>wan</friendlyName><manufacturer>mesh</manufacturer><modelName>wan</modelName>\
         <UDN>uuid:00000000-0000-0000-0000-000000000002</UDN><deviceList><device>\
         <deviceType>urn:schemas-upnp-org:device:WANConnectionDevice:{version}</deviceType>\
         <friendlyName>connection</friendlyName><manufacturer>mesh</manufacturer><modelName>connection</modelName>\
         <UDN>uuid:00000000-0000-0000-0000-000000000003</UDN><serviceList>{services}</serviceList></device>\
         </deviceList></device></deviceList></device></root>"
    )
}

/// The description of a service (UPnP Device Architecture 1.1 §2.5), without the types of its arguments.
pub(super) fn service(path: &str, first_version: bool) -> Option<String> {
    let calls: Vec<Call> = match path {
        CONNECTION_ACTIONS => CONNECTION.into_iter().chain((!first_version).then_some(ADD_ANY)).collect(),
        FIREWALL_ACTIONS if !first_version => FIREWALL.to_vec(),
        _ => return None,
    };
    let arguments = |names: &[&str], direction: &str| -> String {
        let argument = |name| format!("<argument><name>{name}</name><direction>{direction}</direction></argument>");
        names.iter().map(argument).collect()
    };
    let actions: String = calls
        .into_iter()
        .map(|(name, takes, gives)| {
            let list = arguments(takes, "in") + &arguments(gives, "out");
            format!("<action><name>{name}</name><argumentList>{list}</argumentList></action>")
        })
        .collect();
    Some(format!(
        "<?xml version=\"1.0\"?>\r\n<scpd xmlns=\"urn:schemas-upnp-org:service-1-0\"><specVersion><major>1</major>\
         <minor>1</minor></specVersion><actionList>{actions}</actionList><serviceStateTable/></scpd>"
    ))
}
