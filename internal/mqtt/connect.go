package mqtt

// Connect is a CONNECT packet (MQTT 5.0 §3.1). Parsed, it holds copies.
type Connect struct {
	Version    Version
	CleanStart bool // Clean Session in 3.1.1
	KeepAlive  uint16
	ClientID   string
	Will       *Will // nil: none

	HasUsername bool
	Username    string
	HasPassword bool
	Password    []byte

	// The rest is MQTT 5 only.

	SessionExpiry       uint32 // seconds; 0xFFFFFFFF: never
	ReceiveMaximum      uint16 // parsed: 65535 if absent; to encode: 0 and 65535 are left out
	MaximumPacketSize   uint32 // 0: none
	TopicAliasMaximum   uint16
	RequestResponseInfo bool
	NoProblemInfo       bool // request problem information 0
	HasAuth             bool // an authentication method is there
	AuthMethod          string
	AuthData            []byte     // nil: none
	Props               Properties // as in Publish
}

// Will is the will of a CONNECT (MQTT 5.0 §3.1.2.5, §3.1.3.2).
type Will struct {
	Topic   string
	Payload []byte
	QoS     byte
	Retain  bool

	// The rest is MQTT 5 only.

	Delay         uint32 // seconds
	UTF8          bool
	HasExpiry     bool
	Expiry        uint32
	ContentType   []byte // nil: none
	ResponseTopic []byte // nil: none
	Correlation   []byte // nil: none
	Props         Properties
}

var (
	errProtocolName  = &Error{Reason: UnsupportedProtocolVersion, Rule: "MQTT-3.1.2-1", Text: "protocol name is not MQTT"}
	errProtocolLevel = &Error{Reason: UnsupportedProtocolVersion, Rule: "MQTT-3.1.2-2", Text: "protocol level is neither 4 nor 5"}
	errConnectBit    = malformed("MQTT-3.1.2-3", "reserved bit of the connect flags is set")
	errWillQoS3      = malformed("MQTT-3.1.2-12 / MQTT-3.1.2-14", "will QoS 3")
	errWillQoS       = malformed("MQTT-3.1.2-11 / MQTT-3.1.2-13", "will QoS without a will")
	errWillRetain    = malformed("MQTT-3.1.2-13 / MQTT-3.1.2-15", "will retain without a will")
	errPasswordAlone = malformed("MQTT-3.1.2-22", "password without a user name")
	errAuthData      = violation("", "authentication data without an authentication method")
	errClientIDEmpty = &Error{Reason: ClientIDNotValid, Rule: "MQTT-3.1.3-8", Text: "empty client identifier without clean session"}
)

// ParseConnect reads a CONNECT. Its errors say by Answer how to refuse: see
// Error.AppendConnack.
func ParseConnect(frame []byte) (*Connect, error) {
	c := &Connect{ReceiveMaximum: 65535}
	answer, err := c.parse(frame)
	if err != nil {
		e := *err // the shared errors are never changed
		e.Answer = answer
		return nil, &e
	}
	return c, nil
}

// parse returns the version in which an error is to be answered.
func (c *Connect) parse(frame []byte) (answer Version, err *Error) {
	r, err := open(frame, TypeConnect, V311)
	if err != nil {
		return 0, err
	}
	name := r.binary()
	level := r.u8()
	if r.err != nil {
		return 0, r.err
	}
	switch string(name) {
	case "MQTT":
	case "MQIsdp": // MQTT 3.1: known well enough to be told what is wrong
		return V311, errProtocolLevel
	default:
		return 0, errProtocolName
	}
	// A mosquitto bridge sets bit 7 of the level; refused in its own version, it tries
	// again without.
	switch {
	case level == byte(V311) || level == byte(V5):
	case level&0x7f <= byte(V311):
		return V311, errProtocolLevel
	default:
		return V5, errProtocolLevel
	}
	c.Version = Version(level)
	if c.Version == V5 {
		if _, err := open(frame, TypeConnect, V5); err != nil {
			return V5, err
		}
	}
	flags := r.u8()
	c.KeepAlive = r.u16()
	if r.err == nil {
		r.err = checkConnectFlags(flags, c.Version)
	}
	if r.err != nil {
		return c.Version, r.err
	}
	c.CleanStart = flags&connectCleanStart != 0
	if c.Version == V5 {
		c.parseProperties(&r)
	}
	c.ClientID = string(r.text())
	if flags&connectWill != 0 {
		c.Will = &Will{QoS: flags & connectWillQoS >> 3, Retain: flags&connectWillRetain != 0}
		c.Will.parse(&r, c.Version)
	}
	if flags&connectUsername != 0 {
		c.HasUsername, c.Username = true, string(r.text())
	}
	if flags&connectPassword != 0 {
		c.HasPassword, c.Password = true, clone(r.binary())
	}
	if r.err == nil && len(r.b) > 0 {
		r.err = errTrailing
	}
	if r.err == nil && c.ClientID == "" && c.Version == V311 && !c.CleanStart {
		r.err = errClientIDEmpty
	}
	return c.Version, r.err
}

func checkConnectFlags(flags byte, v Version) *Error {
	will := flags&connectWill != 0
	switch {
	case flags&connectReserved != 0:
		return errConnectBit
	case flags&connectWillQoS == connectWillQoS:
		return errWillQoS3
	case !will && flags&connectWillQoS != 0:
		return errWillQoS
	case !will && flags&connectWillRetain != 0:
		return errWillRetain
	case v == V311 && flags&connectPassword != 0 && flags&connectUsername == 0:
		return errPasswordAlone
	}
	return nil
}

func (c *Connect) parseProperties(r *reader) {
	w := r.properties(1 << TypeConnect)
	for {
		x, ok := w.next()
		if !ok {
			break
		}
		switch x.ID {
		case PropSessionExpiry:
			c.SessionExpiry = x.Int
		case PropReceiveMaximum:
			c.ReceiveMaximum = uint16(x.Int)
		case PropMaximumPacketSize:
			c.MaximumPacketSize = x.Int
		case PropTopicAliasMaximum:
			c.TopicAliasMaximum = uint16(x.Int)
		case PropRequestResponseInfo:
			c.RequestResponseInfo = x.Int == 1
		case PropRequestProblemInfo:
			c.NoProblemInfo = x.Int == 0
		case PropAuthMethod:
			c.HasAuth, c.AuthMethod = true, string(x.Data)
		case PropAuthData:
			c.AuthData = clone(x.Data)
		default: // user properties stay in Props
		}
	}
	if w.err == nil && c.AuthData != nil && !c.HasAuth {
		w.fail(errAuthData)
	}
	c.Props = clone(w.into(r))
}

func (w *Will) parse(r *reader, v Version) {
	if v == V5 {
		walk := r.properties(inWill)
		for {
			x, ok := walk.next()
			if !ok {
				break
			}
			switch x.ID {
			case PropWillDelay:
				w.Delay = x.Int
			case PropPayloadFormat:
				w.UTF8 = x.Int == 1
			case PropMessageExpiry:
				w.HasExpiry, w.Expiry = true, x.Int
			case PropContentType:
				w.ContentType = clone(x.Data)
			case PropResponseTopic:
				if len(x.Data) == 0 || scan(x.Data)&hasWildcard != 0 {
					walk.fail(errResponseTopic)
				}
				w.ResponseTopic = clone(x.Data)
			case PropCorrelationData:
				w.Correlation = clone(x.Data)
			default: // user properties stay in Props
			}
		}
		w.Props = clone(walk.into(r))
	}
	topic := r.binary()
	if r.err == nil {
		if err := checkTopic(topic); err != nil {
			r.fail(err)
		}
	}
	w.Topic = string(topic)
	w.Payload = clone(r.binary())
}

// clone copies b; unlike bytes.Clone it never makes nil of what is only empty.
func clone[B ~[]byte](b B) B {
	if b == nil {
		return nil
	}
	return append(B{}, b...)
}

// AppendConnect appends c.
func AppendConnect(dst []byte, c *Connect) []byte {
	var flags byte
	if c.CleanStart {
		flags |= connectCleanStart
	}
	if w := c.Will; w != nil {
		flags |= connectWill | w.QoS<<3
		if w.Retain {
			flags |= connectWillRetain
		}
	}
	if c.HasUsername {
		flags |= connectUsername
	}
	if c.HasPassword {
		flags |= connectPassword
	}
	dst, mark := begin(dst, TypeConnect, 0)
	dst = appendText(dst, "MQTT")
	dst = append(dst, byte(c.Version), flags, byte(c.KeepAlive>>8), byte(c.KeepAlive))
	if c.Version == V5 {
		dst = c.appendProperties(dst)
	}
	dst = appendText(dst, c.ClientID)
	if c.Will != nil {
		if c.Version == V5 {
			dst = c.Will.appendProperties(dst)
		}
		dst = appendText(dst, c.Will.Topic)
		dst = appendText(dst, c.Will.Payload)
	}
	if c.HasUsername {
		dst = appendText(dst, c.Username)
	}
	if c.HasPassword {
		dst = appendText(dst, c.Password)
	}
	return seal(dst, mark)
}

func (c *Connect) appendProperties(dst []byte) []byte {
	dst, mark := room(dst)
	if c.SessionExpiry != 0 {
		dst = appendU32Prop(dst, PropSessionExpiry, c.SessionExpiry)
	}
	if c.ReceiveMaximum != 0 && c.ReceiveMaximum != 65535 {
		dst = appendU16Prop(dst, PropReceiveMaximum, c.ReceiveMaximum)
	}
	if c.MaximumPacketSize != 0 {
		dst = appendU32Prop(dst, PropMaximumPacketSize, c.MaximumPacketSize)
	}
	if c.TopicAliasMaximum != 0 {
		dst = appendU16Prop(dst, PropTopicAliasMaximum, c.TopicAliasMaximum)
	}
	if c.RequestResponseInfo {
		dst = append(dst, byte(PropRequestResponseInfo), 1)
	}
	if c.NoProblemInfo {
		dst = append(dst, byte(PropRequestProblemInfo), 0)
	}
	if c.HasAuth {
		dst = appendTextProp(dst, PropAuthMethod, c.AuthMethod)
	}
	if c.AuthData != nil {
		dst = appendTextProp(dst, PropAuthData, c.AuthData)
	}
	return seal(appendUser(dst, c.Props), mark)
}

func (w *Will) appendProperties(dst []byte) []byte {
	dst, mark := room(dst)
	if w.Delay != 0 {
		dst = appendU32Prop(dst, PropWillDelay, w.Delay)
	}
	if w.UTF8 {
		dst = append(dst, byte(PropPayloadFormat), 1)
	}
	if w.HasExpiry {
		dst = appendU32Prop(dst, PropMessageExpiry, w.Expiry)
	}
	if w.ContentType != nil {
		dst = appendTextProp(dst, PropContentType, w.ContentType)
	}
	if w.ResponseTopic != nil {
		dst = appendTextProp(dst, PropResponseTopic, w.ResponseTopic)
	}
	if w.Correlation != nil {
		dst = appendTextProp(dst, PropCorrelationData, w.Correlation)
	}
	return seal(appendUser(dst, w.Props), mark)
}
