package mqtt

// Connack is a CONNACK packet (MQTT 5.0 §3.2). In 3.1.1 Reason stands for the return code:
// see Reason.ReturnCode. The zero value of a property is what its absence means.
type Connack struct {
	SessionPresent bool
	Reason         Reason

	// The rest is MQTT 5 only.

	HasSessionExpiry  bool
	SessionExpiry     uint32
	ReceiveMaximum    uint16 // parsed: 65535 if absent; to encode: 0 and 65535 are left out
	HasMaximumQoS     bool
	MaximumQoS        byte // 0 or 1, if HasMaximumQoS; else QoS 2 is supported
	NoRetain          bool
	MaximumPacketSize uint32 // 0: no limit
	AssignedClientID  string // "": none
	TopicAliasMaximum uint16
	ReasonString      string // "": none
	NoWildcard        bool
	NoSubscriptionIDs bool
	NoShared          bool
	HasKeepAlive      bool
	KeepAlive         uint16 // the server's, if HasKeepAlive
	ResponseInfo      string // "": none
	ServerReference   string // "": none
	HasAuth           bool
	AuthMethod        string
	AuthData          []byte     // nil: none
	Props             Properties // as in Publish
}

var (
	errConnackFlags   = malformed("MQTT-3.2.2-1", "reserved bits of the connect acknowledge flags are set")
	errConnackCode    = malformed("MQTT-3.2.2-8 / MQTT-3.2.2-6", "reason code is not one of CONNACK")
	errConnackSession = violation("MQTT-3.2.2-6 / MQTT-3.2.2-4", "session present in a refusal")
)

// ParseConnack reads a CONNACK.
func ParseConnack(frame []byte, v Version) (*Connack, error) {
	r, err := open(frame, TypeConnack, v)
	if err != nil {
		return nil, err
	}
	c := &Connack{ReceiveMaximum: 65535}
	flags, code := r.u8(), r.u8()
	switch {
	case r.err != nil:
	case flags > 1:
		r.fail(errConnackFlags)
	case v == V5 && !Reason(code).allowed(inConnack), v != V5 && int(code) >= len(returnCodes):
		r.fail(errConnackCode)
	case flags == 1 && code != 0:
		r.fail(errConnackSession)
	case v == V5:
		c.SessionPresent, c.Reason = flags == 1, Reason(code)
		c.parseProperties(&r)
	default:
		c.SessionPresent, c.Reason = flags == 1, returnCodes[code]
	}
	if err := r.end(); err != nil {
		return nil, err
	}
	return c, nil
}

func (c *Connack) parseProperties(r *reader) {
	w := r.properties(1 << TypeConnack)
	for {
		x, ok := w.next()
		if !ok {
			break
		}
		switch x.ID {
		case PropSessionExpiry:
			c.HasSessionExpiry, c.SessionExpiry = true, x.Int
		case PropReceiveMaximum:
			c.ReceiveMaximum = uint16(x.Int)
		case PropMaximumQoS:
			c.HasMaximumQoS, c.MaximumQoS = true, byte(x.Int)
		case PropRetainAvailable:
			c.NoRetain = x.Int == 0
		case PropMaximumPacketSize:
			c.MaximumPacketSize = x.Int
		case PropAssignedClientID:
			c.AssignedClientID = string(x.Data)
		case PropTopicAliasMaximum:
			c.TopicAliasMaximum = uint16(x.Int)
		case PropReasonString:
			c.ReasonString = string(x.Data)
		case PropWildcardAvailable:
			c.NoWildcard = x.Int == 0
		case PropSubscriptionIDsAvail:
			c.NoSubscriptionIDs = x.Int == 0
		case PropSharedSubscriptsAvail:
			c.NoShared = x.Int == 0
		case PropServerKeepAlive:
			c.HasKeepAlive, c.KeepAlive = true, uint16(x.Int)
		case PropResponseInfo:
			c.ResponseInfo = string(x.Data)
		case PropServerReference:
			c.ServerReference = string(x.Data)
		case PropAuthMethod:
			c.HasAuth, c.AuthMethod = true, string(x.Data)
		case PropAuthData:
			c.AuthData = clone(x.Data)
		default: // user properties stay in Props
		}
	}
	c.Props = clone(w.into(r))
}

// AppendConnack appends c. A refusal never says session present, and in 3.1.1 a reason
// without a return code becomes 3, server unavailable.
func AppendConnack(dst []byte, v Version, c *Connack) []byte {
	dst, mark := begin(dst, TypeConnack, 0)
	var flags byte
	if c.SessionPresent && c.Reason == Success {
		flags = 1
	}
	if v != V5 {
		code := c.Reason.ReturnCode()
		if code == 0 && c.Reason != Success {
			code = 3
		}
		return seal(append(dst, flags, code), mark)
	}
	dst = append(dst, flags, byte(c.Reason))
	return seal(c.appendProperties(dst), mark)
}

func (c *Connack) appendProperties(dst []byte) []byte {
	dst, mark := room(dst)
	if c.HasSessionExpiry {
		dst = appendU32Prop(dst, PropSessionExpiry, c.SessionExpiry)
	}
	if c.ReceiveMaximum != 0 && c.ReceiveMaximum != 65535 {
		dst = appendU16Prop(dst, PropReceiveMaximum, c.ReceiveMaximum)
	}
	if c.HasMaximumQoS {
		dst = append(dst, byte(PropMaximumQoS), c.MaximumQoS)
	}
	if c.MaximumPacketSize != 0 {
		dst = appendU32Prop(dst, PropMaximumPacketSize, c.MaximumPacketSize)
	}
	if c.TopicAliasMaximum != 0 {
		dst = appendU16Prop(dst, PropTopicAliasMaximum, c.TopicAliasMaximum)
	}
	if c.HasKeepAlive {
		dst = appendU16Prop(dst, PropServerKeepAlive, c.KeepAlive)
	}
	for _, p := range [...]struct {
		id PropertyID
		no bool
	}{
		{PropRetainAvailable, c.NoRetain},
		{PropWildcardAvailable, c.NoWildcard},
		{PropSubscriptionIDsAvail, c.NoSubscriptionIDs},
		{PropSharedSubscriptsAvail, c.NoShared},
	} {
		if p.no {
			dst = append(dst, byte(p.id), 0)
		}
	}
	for _, p := range [...]struct {
		id PropertyID
		s  string
	}{
		{PropAssignedClientID, c.AssignedClientID},
		{PropReasonString, c.ReasonString},
		{PropResponseInfo, c.ResponseInfo},
		{PropServerReference, c.ServerReference},
	} {
		if p.s != "" {
			dst = appendTextProp(dst, p.id, p.s)
		}
	}
	if c.HasAuth {
		dst = appendTextProp(dst, PropAuthMethod, c.AuthMethod)
	}
	if c.AuthData != nil {
		dst = appendTextProp(dst, PropAuthData, c.AuthData)
	}
	return seal(appendUser(dst, c.Props), mark)
}
