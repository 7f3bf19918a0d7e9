package mqtt

// Reason is an MQTT 5 reason code (MQTT 5.0 §2.4). Below 0x80 it says success.
type Reason byte

// The reason codes.
const (
	Success                     Reason = 0x00 // also Normal disconnection, Granted QoS 0
	GrantedQoS1                 Reason = 0x01
	GrantedQoS2                 Reason = 0x02
	DisconnectWithWill          Reason = 0x04
	NoMatchingSubscribers       Reason = 0x10
	NoSubscriptionExisted       Reason = 0x11
	ContinueAuthentication      Reason = 0x18
	Reauthenticate              Reason = 0x19
	UnspecifiedError            Reason = 0x80
	MalformedPacket             Reason = 0x81
	ProtocolError               Reason = 0x82
	ImplementationSpecificError Reason = 0x83
	UnsupportedProtocolVersion  Reason = 0x84
	ClientIDNotValid            Reason = 0x85
	BadUsernameOrPassword       Reason = 0x86
	NotAuthorized               Reason = 0x87
	ServerUnavailable           Reason = 0x88
	ServerBusy                  Reason = 0x89
	Banned                      Reason = 0x8A
	ServerShuttingDown          Reason = 0x8B
	BadAuthenticationMethod     Reason = 0x8C
	KeepAliveTimeout            Reason = 0x8D
	SessionTakenOver            Reason = 0x8E
	TopicFilterInvalid          Reason = 0x8F
	TopicNameInvalid            Reason = 0x90
	PacketIDInUse               Reason = 0x91
	PacketIDNotFound            Reason = 0x92
	ReceiveMaximumExceeded      Reason = 0x93
	TopicAliasInvalid           Reason = 0x94
	PacketTooLarge              Reason = 0x95
	MessageRateTooHigh          Reason = 0x96
	QuotaExceeded               Reason = 0x97
	AdministrativeAction        Reason = 0x98
	PayloadFormatInvalid        Reason = 0x99
	RetainNotSupported          Reason = 0x9A
	QoSNotSupported             Reason = 0x9B
	UseAnotherServer            Reason = 0x9C
	ServerMoved                 Reason = 0x9D
	SharedNotSupported          Reason = 0x9E
	ConnectionRateExceeded      Reason = 0x9F
	MaximumConnectTime          Reason = 0xA0
	SubscriptionIDsNotSupported Reason = 0xA1
	WildcardNotSupported        Reason = 0xA2
)

// The contexts in which a reason code may stand, one bit each.
const (
	inConnack = 1 << iota
	inPuback  // and PUBREC
	inPubrel  // and PUBCOMP
	inSuback
	inUnsuback
	inDisconnectClient
	inDisconnectServer
	inAuth

	inDisconnect = inDisconnectClient | inDisconnectServer
)

type reasonInfo struct {
	name string
	in   uint8
}

// reasons is the table of MQTT 5.0 §2.4 with the senders of §3.14.2.1.
var reasons = [256]reasonInfo{
	Success:                     {"success", inConnack | inPuback | inPubrel | inSuback | inUnsuback | inDisconnect | inAuth},
	GrantedQoS1:                 {"granted QoS 1", inSuback},
	GrantedQoS2:                 {"granted QoS 2", inSuback},
	DisconnectWithWill:          {"disconnect with will message", inDisconnectClient},
	NoMatchingSubscribers:       {"no matching subscribers", inPuback},
	NoSubscriptionExisted:       {"no subscription existed", inUnsuback},
	ContinueAuthentication:      {"continue authentication", inAuth},
	Reauthenticate:              {"re-authenticate", inAuth},
	UnspecifiedError:            {"unspecified error", inConnack | inPuback | inSuback | inUnsuback | inDisconnect},
	MalformedPacket:             {"malformed packet", inConnack | inDisconnect},
	ProtocolError:               {"protocol error", inConnack | inDisconnect},
	ImplementationSpecificError: {"implementation specific error", inConnack | inPuback | inSuback | inUnsuback | inDisconnect},
	UnsupportedProtocolVersion:  {"unsupported protocol version", inConnack},
	ClientIDNotValid:            {"client identifier not valid", inConnack},
	BadUsernameOrPassword:       {"bad user name or password", inConnack},
	NotAuthorized:               {"not authorized", inConnack | inPuback | inSuback | inUnsuback | inDisconnectServer},
	ServerUnavailable:           {"server unavailable", inConnack},
	ServerBusy:                  {"server busy", inConnack | inDisconnectServer},
	Banned:                      {"banned", inConnack},
	ServerShuttingDown:          {"server shutting down", inDisconnectServer},
	BadAuthenticationMethod:     {"bad authentication method", inConnack | inDisconnectServer},
	KeepAliveTimeout:            {"keep alive timeout", inDisconnectServer},
	SessionTakenOver:            {"session taken over", inDisconnectServer},
	TopicFilterInvalid:          {"topic filter invalid", inSuback | inUnsuback | inDisconnectServer},
	TopicNameInvalid:            {"topic name invalid", inConnack | inPuback | inDisconnect},
	PacketIDInUse:               {"packet identifier in use", inPuback | inSuback | inUnsuback},
	PacketIDNotFound:            {"packet identifier not found", inPubrel},
	ReceiveMaximumExceeded:      {"receive maximum exceeded", inDisconnect},
	TopicAliasInvalid:           {"topic alias invalid", inDisconnect},
	PacketTooLarge:              {"packet too large", inConnack | inDisconnect},
	MessageRateTooHigh:          {"message rate too high", inDisconnect},
	QuotaExceeded:               {"quota exceeded", inConnack | inPuback | inSuback | inDisconnect},
	AdministrativeAction:        {"administrative action", inDisconnect},
	PayloadFormatInvalid:        {"payload format invalid", inConnack | inPuback | inDisconnect},
	RetainNotSupported:          {"retain not supported", inConnack | inDisconnectServer},
	QoSNotSupported:             {"QoS not supported", inConnack | inDisconnectServer},
	UseAnotherServer:            {"use another server", inConnack | inDisconnectServer},
	ServerMoved:                 {"server moved", inConnack | inDisconnectServer},
	SharedNotSupported:          {"shared subscriptions not supported", inSuback | inDisconnectServer},
	ConnectionRateExceeded:      {"connection rate exceeded", inConnack | inDisconnectServer},
	MaximumConnectTime:          {"maximum connect time", inDisconnectServer},
	SubscriptionIDsNotSupported: {"subscription identifiers not supported", inSuback | inDisconnectServer},
	WildcardNotSupported:        {"wildcard subscriptions not supported", inSuback | inDisconnectServer},
}

// String gives the code's name and number, such as "quota exceeded (0x97)".
func (r Reason) String() string {
	n := "0x" + string("0123456789abcdef"[r>>4]) + string("0123456789abcdef"[r&15])
	if name := reasons[r].name; name != "" {
		return name + " (" + n + ")"
	}
	return "reason " + n
}

// Failed says whether r reports a failure (MQTT 5.0 §2.4: 0x80 and above).
func (r Reason) Failed() bool { return r >= 0x80 }

func (r Reason) allowed(in uint8) bool { return reasons[r].in&in != 0 }

// ReturnCode gives the CONNACK return code with which MQTT 3.1.1 says r
// (MQTT 3.1.1 §3.2.2.3), and 0 if it has no way to say it: then the connection is closed
// without a CONNACK.
func (r Reason) ReturnCode() byte {
	switch r {
	case UnsupportedProtocolVersion:
		return 1
	case ClientIDNotValid:
		return 2
	case ServerUnavailable, ServerBusy, UseAnotherServer, ServerMoved, QuotaExceeded, ConnectionRateExceeded:
		return 3
	case BadUsernameOrPassword:
		return 4
	case NotAuthorized, Banned:
		return 5
	default:
		return 0
	}
}

// returnCodes are the reasons behind MQTT 3.1.1's CONNACK return codes.
var returnCodes = [6]Reason{
	Success, UnsupportedProtocolVersion, ClientIDNotValid, ServerUnavailable, BadUsernameOrPassword, NotAuthorized,
}

// Error says how a packet breaks the protocol. The connection has to be closed; MQTT 5
// peers may be told Reason first (MQTT 5.0 §4.13).
type Error struct {
	Reason Reason
	Text   string
	// Rule is the normative statement, such as "MQTT-3.3.2-2" (of MQTT 5.0; where 3.1.1
	// numbers it otherwise, its number follows after a slash). Empty where the
	// specification demands without a number.
	Rule string
	// Answer is set by ParseConnect only: the version in which CONNACK is to be sent before
	// closing, 0 for closing without a word.
	Answer Version
}

// Error gives the text, the rule and the reason.
func (e *Error) Error() string {
	s := e.Text
	if e.Rule != "" {
		s += " [" + e.Rule + "]"
	}
	return s + ": " + e.Reason.String()
}

// AppendConnack appends the CONNACK that e, an error of ParseConnect, calls for. It
// appends nothing if the connection is to be closed without one.
func (e *Error) AppendConnack(dst []byte) []byte {
	switch e.Answer {
	case V5:
		return AppendConnack(dst, V5, &Connack{Reason: e.Reason})
	case V311:
		if e.Reason.ReturnCode() != 0 {
			return AppendConnack(dst, V311, &Connack{Reason: e.Reason})
		}
	}
	return dst
}

func malformed(rule, text string) *Error {
	return &Error{Reason: MalformedPacket, Rule: rule, Text: text}
}

func violation(rule, text string) *Error {
	return &Error{Reason: ProtocolError, Rule: rule, Text: text}
}
